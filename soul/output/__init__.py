"""The output of a run: complete files (`files`), the output directory (`directory`), the console (`console`).

May import: nothing of ``soul``.
Start reading with `directory`.
"""
