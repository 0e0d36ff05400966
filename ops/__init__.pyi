# The public names and the modules that define them. `import ops` and type checkers read this file
# to find a name, so an op adds its line here and nowhere else in the package.

from . import jit as jit
from ._core.dispatch import Op as Op
from ._core.explain import explain as explain
from ._core.selection import use_backend as use_backend
from ._errors import (
    ArgumentError as ArgumentError,
    ArgumentTypeError as ArgumentTypeError,
    BackendUnavailableError as BackendUnavailableError,
    BackendWarning as BackendWarning,
    BuildError as BuildError,
    BuildTimeoutError as BuildTimeoutError,
    BundleError as BundleError,
    CacheError as CacheError,
    CacheWarning as CacheWarning,
    ConfigError as ConfigError,
    ConfigWarning as ConfigWarning,
    DependencyError as DependencyError,
    GradientCheckError as GradientCheckError,
    GradientCheckWarning as GradientCheckWarning,
    GradientError as GradientError,
    JitopsError as JitopsError,
    NotBuiltError as NotBuiltError,
    ToolchainError as ToolchainError,
)
from .arrays.from_numpy import NumpyOp as NumpyOp, from_numpy as from_numpy
from .gradcheck.check_gradients import (
    GradientReport as GradientReport,
    check_gradients as check_gradients,
)
from .layers.linear import LinearFunction as LinearFunction, linear as linear
from .layers.lltm import (
    LLTM as LLTM,
    LLTMFunction as LLTMFunction,
    LLTMState as LLTMState,
    lltm as lltm,
    lltm_sequence as lltm_sequence,
)
from .layers.normalize_with_norm import (
    DirectionAndNorm as DirectionAndNorm,
    NormalizeWithNormFunction as NormalizeWithNormFunction,
    normalize_with_norm as normalize_with_norm,
)
from .layers.rfft2_magnitude import rfft2_magnitude as rfft2_magnitude
from .layers.scipy_conv2d import ScipyConv2d as ScipyConv2d, scipy_conv2d as scipy_conv2d
from .losses.batch_all_triplet_loss import (
    BatchAllTripletLoss as BatchAllTripletLoss,
    batch_all_triplet_loss as batch_all_triplet_loss,
)
from .losses.batch_hard_triplet_loss import (
    BatchHardTripletLoss as BatchHardTripletLoss,
    batch_hard_triplet_loss as batch_hard_triplet_loss,
)
from .losses.batch_semi_hard_triplet_loss import (
    BatchSemiHardTripletLoss as BatchSemiHardTripletLoss,
    batch_semi_hard_triplet_loss as batch_semi_hard_triplet_loss,
)
from .losses.chamfer_distance import (
    ChamferDistance as ChamferDistance,
    chamfer_distance as chamfer_distance,
)
from .losses.hausdorff_dt_loss import (
    HausdorffDTLoss as HausdorffDTLoss,
    hausdorff_dt_loss as hausdorff_dt_loss,
)
from .losses.improved_triplet_loss import (
    ImprovedTripletLoss as ImprovedTripletLoss,
    TripletLossFunc as TripletLossFunc,
    improved_triplet_loss as improved_triplet_loss,
)
from .losses.info_nce_loss import (
    InfoNCELoss as InfoNCELoss,
    info_nce_loss as info_nce_loss,
)
from .losses.knn_points import KNN as KNN, knn_points as knn_points
from .losses.linear_cross_entropy import (
    LinearCrossEntropyLoss as LinearCrossEntropyLoss,
    LinearLogProb as LinearLogProb,
    linear_cross_entropy as linear_cross_entropy,
    linear_log_prob as linear_log_prob,
)
from .losses.lncc_loss import LNCCLoss as LNCCLoss, lncc_loss as lncc_loss
from .losses.margin_softmax_loss import (
    MarginSoftmaxLoss as MarginSoftmaxLoss,
    margin_softmax_loss as margin_softmax_loss,
)
from .losses.monotonic_alignment_search import (
    monotonic_alignment_search as monotonic_alignment_search,
)
from .losses.ms_ssim import MSSSIMLoss as MSSSIMLoss, ms_ssim as ms_ssim
from .losses.set_matching_loss import (
    SetMatching as SetMatching,
    SetMatchingLoss as SetMatchingLoss,
    set_matching_loss as set_matching_loss,
)
from .losses.soft_dtw import (
    SoftDTW as SoftDTW,
    soft_dtw as soft_dtw,
    soft_dtw_alignment as soft_dtw_alignment,
    soft_dtw_from_cost as soft_dtw_from_cost,
)
from .losses.ssim import (
    SSIMLoss as SSIMLoss,
    ssim as ssim,
    ssim_loss as ssim_loss,
    ssim_map as ssim_map,
)
from .losses.supcon_loss import SupConLoss as SupConLoss, supcon_loss as supcon_loss

__version__: str
