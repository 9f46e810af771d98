"""Label Studio: its REST API, the payloads it sends and expects, and its label config."""
