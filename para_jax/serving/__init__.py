"""The engine: many tenants' requests, served continuously."""
