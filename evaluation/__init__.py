"""A finished student, and what it knows: ``from evaluation import load_student``."""


def __getattr__(name: str):
    # Here, so that a table of runs pays for no torch.
    if name == "load_student":
        from .student import load_student

        return load_student
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
