"""Property tests have no time limit of their own: the machine may be busy."""

from hypothesis import HealthCheck, settings

settings.register_profile("k2", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("k2")
