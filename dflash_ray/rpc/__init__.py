"""How processes find and reach each other: gRPC servers and channels, and the directory with its leases. No torch."""
