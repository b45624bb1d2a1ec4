"""Small programs under Dynamo's names: they find each other through files, as Dynamo's do."""
