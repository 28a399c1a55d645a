-- Pairs with and without a kept attribute: all, those that converged, and those in which it flips.
SELECT kept_probs_initial[$index] > 0.5 AS is_set, count(*), count(*) FILTER (converged),
       count(*) FILTER (converged AND (kept_probs_final[$index] > 0.5) <> (kept_probs_initial[$index] > 0.5))
FROM counterfactuals GROUP BY 1 ORDER BY 1 DESC
