"""The offline default: a generator of HelpSteer-shaped rows, the rater that knows its rules, and a tiny base model.

The three belong together. The generator writes short answers about household objects and rates them with the noise
of a human annotator; the rater applies the same rules, without noise, to whatever a trained policy says; the model
was pre-trained on the generator's text, so that a whole MODPO experiment takes minutes on a laptop's CPU.
"""
