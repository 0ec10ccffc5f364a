"""The HTTP server: OpenAI's endpoints in front of engines that run in processes of their own.

limits, settings    how much of everything; where to listen and who may ask
guard, http_server  what stands before the app: keys, hosts, deadlines, signals
app, generation     routes; a request on its way from body to answer
router, engine_client, mailbox   which engine, its process seen from here, what it said
frames, wire, engine_process     what goes through the socket; the process itself
metrics             what Prometheus reads
run, ray_app        the whole, in this process or on a Ray cluster
"""
