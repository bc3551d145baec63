"""Publishing of a saved model on the Hugging Face Hub: its card (`card`), and the upload (`push`).

May import: _extras, output, report.
Start reading with `push`.
"""
