"""The commands of ``soul``: one module each, with ``HELP``, ``add_arguments(parser)`` and ``run(args)``.

The modules ``*_options`` declare options that several commands share, `lists` parses their values, and `config_file` reads
options from YAML. May import every wing of ``soul``. Start reading with `soul.cli`, then `unlearn`.
"""
