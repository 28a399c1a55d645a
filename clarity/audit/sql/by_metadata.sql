-- A join with your own table or view metadata, with the columns image_id and segment.
SELECT segment,
       count(DISTINCT image_id) AS images,
       count(*) AS pairs,
       round(count(*) FILTER (converged) / count(*), 4) AS strict_validity,
       round(median(distance_z_l1) FILTER (converged), 2) AS median_distance
FROM counterfactuals JOIN metadata USING (image_id)
GROUP BY segment
ORDER BY segment
