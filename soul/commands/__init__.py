"""The commands of ``soul``: a file each, with ``HELP``, ``add_arguments(parser)`` and ``run(args)``."""
