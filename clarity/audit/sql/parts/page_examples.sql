-- Examples of each kind for each class pair, by latent distance; failed ones by probability.
WITH ranked AS (
    SELECT image_id, source, target, converged,
           row_number() OVER near AS near, count(*) OVER (PARTITION BY source, target, converged) AS n
    FROM counterfactuals WHERE converged IS NOT NULL
    WINDOW near AS (PARTITION BY source, target, converged
                    ORDER BY CASE WHEN converged THEN distance_z_l1 ELSE target_prob_final END, image_id)
)
SELECT image_id, source, target,
       CASE WHEN NOT converged THEN 'failed' WHEN near <= $each THEN 'closest'
            WHEN near > n - $each THEN 'hardest' ELSE 'median' END AS kind,
       row_number() OVER (
           PARTITION BY source, target, kind
           ORDER BY CASE kind WHEN 'hardest' THEN -near WHEN 'median' THEN abs(2 * near - n - 1) ELSE near END,
                    near
       ) AS rank
FROM ranked QUALIFY rank <= $each
ORDER BY source, target, list_position($kinds, kind), rank
