"""Many models, each with several replicas, behind one address: placed and kept alive by Ray Serve, routed by us.

A replica is an api_server of its own (`lmtool.server.supervisor`). Knows no route of its API and no tensor.
"""
