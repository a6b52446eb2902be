def check_library_model(name):
    raise NotImplementedError


def create_library_model(name, num_classes, **options):
    raise NotImplementedError


def load_into(model, state):
    raise NotImplementedError
