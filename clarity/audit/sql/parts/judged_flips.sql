-- Of the converged pairs that a held-out judge measured, those in which it sees an attribute flip.
SELECT attribute, count(*) FILTER ((prob_initial > 0.5) <> (prob_final > 0.5)), count(*)
FROM attributes JOIN counterfactuals USING (image_id, target)
WHERE converged AND attribute IN (SELECT unnest($keep)) GROUP BY 1
