"""Everything that communicates: topology, coordinator, replicas, chain, mailbox. Knows nothing of
tasks."""
