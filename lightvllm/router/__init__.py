"""The router: several models and replicas behind one address. Knows them by HTTP alone."""
