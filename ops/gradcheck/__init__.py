"""The parts of :func:`ops.check_gradients`.

====================  ==============================================================================
``_table``            the list of all checks
``_subject``          turns any function or module into a function of a list of tensors
``_traits``           finds its dtype and precision, and whether it draws random numbers
``_probe``            runs it on one back end; ``_draws`` gives it the same random numbers
``_derivatives``      checks: gradients against difference quotients, in any order
``_second_opinion``   asks torch's own check about a wrong gradient
``_transforms``       checks: forward mode, batched gradients, vmap
``_requests``         checks: gradients of some inputs, of some results, in other modes
``_calls``            checks: repeated, interleaved and nested calls, side effects
``_layouts``          checks: memory layouts
``_agreement``        checks: dtypes and back ends
``_quotients``        compares derivatives with quotients; ``_slopes`` and ``_kinks`` decide
``_mismatch``         describes where two results differ
``_comparison``       the compared derivatives, and a description of the wrong ones
``_report``           the results of all checks; ``_plot`` draws them
====================  ==============================================================================
"""
