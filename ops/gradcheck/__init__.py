"""The parts of :func:`ops.check_gradients`.

====================  ==============================================================================
``_table``            every promise, and the function that checks it
``_subject``          makes any function or module a function of a list of tensors
``_traits``           which dtype it runs in, how precisely it computes, whether it draws numbers
``_probe``            runs it on one back end; ``_draws`` gives it the same random numbers
``_derivatives``      checks: gradients against difference quotients, in any order
``_second_opinion``   what torch's own check says of a gradient that is wrong
``_transforms``       checks: forward mode, batched gradients, vmap
``_requests``         checks: the same however one asks for gradients
``_calls``            checks: the same whatever else is called, and nothing else changed
``_layouts``          checks: the same however tensors lie in memory
``_agreement``        checks: the same in every dtype, on every back end
``_differences``      compares derivatives with quotients: ``_slopes`` and ``_kinks`` decide
``_differ``           says where two results differ
``_comparison``       which derivatives were compared, and what is wrong with them
``_report``           what all checks found; ``_plot`` draws it
====================  ==============================================================================
"""
