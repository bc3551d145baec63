"""The commands of ``soul``: one module each, with ``HELP``, ``add_arguments(parser)`` and ``run(args)``; and shared options.

May import: soul, _extras, checkpoint, data, distributed, durability, evaluate, hub, losses, models, output, plan, presets,
report, run, study, tasks.
Start reading with `unlearn`; `soul.cli` calls it.
"""
