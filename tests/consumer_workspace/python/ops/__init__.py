"""A package of the consumer."""

OWNER = "consumer"
