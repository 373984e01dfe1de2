"""The worker: the process that holds a site's records and answers a closed set of requests."""
