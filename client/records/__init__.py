"""When two records are the same record: canonical values, fingerprints, links of prepared rows."""
