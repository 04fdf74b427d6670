from hypothesis import HealthCheck, settings

# Other jobs share the machine: time is no sign of a fault here.
settings.register_profile("shared-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared-machine")
