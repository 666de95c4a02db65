"""Any optimizer class, held to float64 rules, resume, sharding, routing, bytes and step time; by calls only."""
