"""The server: the Open Inference Protocol and ``/v1/rank`` over HTTP and gRPC, in one process or several."""
