"""What a run writes: files that are whole or not there (`files`), the output directory (`directory`), the console (`console`).

May import: nothing of ``soul``. Start with `directory`.
"""
