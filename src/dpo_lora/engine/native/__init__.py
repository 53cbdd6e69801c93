"""What the pair engine computes in C++ on a CPU, compiled on the machine that runs it; torch's operations do the same
where there is no compiler."""
