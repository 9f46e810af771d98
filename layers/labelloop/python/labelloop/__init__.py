"""labelloop: what the functions, the training job, the stacks and the tools share.

The modules, in the order of the loop: `errors`, `settings`, `model_config`, `records`, `artifacts`, `ledger`,
`label_studio`, `ingest`, `imaging`, `inference`, `predict`, `policy`, `dataset`, `launcher`, `retrain`,
`promotion`, `registry`, `refresh`.
"""
