"""Everything that communicates: topology, shared modules, replicas, chain, mailbox.

It knows nothing of tasks.
"""
