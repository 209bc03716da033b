"""Version of the target, drafter and router contracts; both ends of a stream must speak the same."""

PROTOCOL_VERSION = 8
