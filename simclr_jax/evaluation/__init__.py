"""Features of whole datasets: their health and accuracy, neighbours, and images worth a label."""
