"""What is looked at: each module sees one part of a deployment, and judges nothing."""
