"""The output of a run: complete files (`files`), the output directory (`directory`), the console (`console`).

What a user sees while a command works is `progress`, and which warnings of other libraries are not shown is `notices`.

May import: nothing of ``soul``.
Start reading with `directory`.
"""
