"""A site's folder and the policy that its owner signs."""
