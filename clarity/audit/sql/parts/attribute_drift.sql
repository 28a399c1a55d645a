-- Changes of each attribute for each class pair with enough pairs.
SELECT attribute, source, target, list(prob_final - prob_initial ORDER BY image_id),
       count(*) FILTER ((prob_initial > 0.5) <> (prob_final > 0.5))
FROM attributes JOIN counterfactuals USING (image_id, target)
WHERE converged GROUP BY ALL HAVING count(*) >= $min_pairs ORDER BY attribute, source, target
