"""The tested companion package of the book *From LoRA to QLoRA*.

One module ("room") a chapter, laid out along the same road as the book. Importing the package alone
imports nothing else; import the room you want, or `lora2qlora.lab` for models, tasks and training.
"""

__version__ = "0.1.0"
