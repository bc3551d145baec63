"""Several processes: what each of them holds of a tensor (`shards`), and the group that torchrun starts (`processes`).

May import: nothing of ``soul`` but ``_extras``. Start with `processes`.
"""
