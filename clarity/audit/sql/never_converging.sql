-- Images with pairs that did not converge, those with most failures first.
-- Parameters: {"count": 10}
SELECT image_id, source_name,
       count(*) FILTER (NOT converged) AS failed,
       count(*) AS pairs,
       string_agg(target_name, ', ' ORDER BY target) FILTER (NOT converged) AS targets,
       round(max(target_prob_final) FILTER (NOT converged), 4) AS best_target_prob
FROM counterfactuals
GROUP BY ALL
HAVING failed > 0
ORDER BY failed DESC, image_id
LIMIT $count
