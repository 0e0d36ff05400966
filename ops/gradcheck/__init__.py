"""The parts of :func:`ops.check_gradients`.

``_differences`` compares derivatives with difference quotients and knows nothing of autograd;
``_differ`` says where two results differ; ``_subject`` makes any function or module a function of a
list of tensors; ``_probe`` runs one on one back end; ``_derivatives`` and ``_consistency`` are the
checks; ``_report`` is what they found.
"""
