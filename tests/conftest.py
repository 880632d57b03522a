from hypothesis import settings

# how long an example takes says nothing about whether the code is right, least of all on a busy machine
settings.register_profile("muvit", deadline=None)
settings.load_profile("muvit")
