"""What a run writes: complete files (`files`), the output directory (`directory`), the console (`console`).

May import: nothing of ``soul``. Start with `directory`.
"""
