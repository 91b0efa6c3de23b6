"""What chapters need to run experiments: models, tasks, training, records, notebook helpers.

The rooms of the package never import the lab.
"""
