"""Tolerances: every number that decides a verdict, in one table.

Each line is followed by its source, and by the test that fails if the number is ten times larger or smaller: "here" is
``tests/landscape/test_tolerances.py``; "none" means that no verdict was seen to change, and how this was tried.
Functions read the numbers when they run, so that a test can change one. Sizes of blocks and numbers of draws, which
decide only how long something takes, stay where they are used.
"""

# Floats
UNIT_ROUNDOFF = 2.0**-53  # largest relative rounding error of one operation in float64
# Source: IEEE 754: half of the spacing at 1. Test: here.
FLOAT64_EPS = 2.0**-52  # spacing of float64 at 1
# Source: IEEE 754. Test: here.

# Certificates of two-layer networks
MAX_KINK_SINE = 1e-2  # |w·x|/(‖w‖‖x‖) up to which a sample may be moved onto its kink
# Source: chosen: a kink further off moves its row by more than 1 %, ten times the default max_distance. Test: here.
MIN_KINK_GAP_RATIO = 10.0  # ratio of two successive sorted sines that may separate kinks from the rest
# Source: chosen: between the two smallest of uniform sines it occurs once in ten. Test: here.
MAX_KINK_ROUNDINGS = 8.0  # |w·x| of a sample on its kink, in bounds on its rounding error
# Source: chosen: solutions on a face leave their kinks by a few bounds. Test: none, 32 networks, test_certify.
MAX_ROUNDING_PER_TARGET = 1e-6  # rounding errors of ŷ, relative to y, up to which e = 0 can be tested
# Source: chosen: zero error is then proved to six digits of the targets. Test: here.
MAX_ROUNDING_PER_RESIDUAL = 1e-6  # rounding errors of G e, relative to e, up to which G e = 0 can be tested
# Source: chosen: G e = 0 is then proved to six digits of e. Test: here.
MAX_ZERO_SINGULAR_RATIO = 1e-10  # singular value, relative to the largest, that counts as zero: kinks' inputs, faces
# Source: chosen: some 1e5 roundings. Test: here.
MAX_OFF_SPAN_RATIO = 1e-12  # part of an input outside the span of a unit's kinks that counts as zero
# Source: chosen: some thousand roundings. Test: here.
MIN_INDEPENDENT_SINGULAR_RATIO = 1e-7  # smallest singular value, relative to the largest, of independent kinks
# Source: chosen: half of the digits of float64; multipliers keep the other half. Test: here.
MAX_UNBALANCED_FORCE_RATIO = 1e-12  # part of a force that no multipliers balance, up to which it counts as zero
# Source: chosen: some thousand roundings. Test: here.
LINEAR_PROGRAM_ERROR_RATIO = 1e-9  # result of a linear program, relative to its forces, that counts as zero
# Source: chosen: far above rounding, below the tolerance of HiGHS (1e-7), whose result is refined. Test: here.
MIN_KINK_EXIT_RATE = 1e-6  # rate at which every degenerate kink must be left
# Source: chosen: above the tolerance of HiGHS (1e-7). Test: none, 32 networks, test_certify.
MAX_KINK_EXIT_RATIO = 1e-4  # step that leaves degenerate kinks, relative to the weights
# Source: chosen: a tenth of the default max_distance. Test: none, 32 networks, test_certify.

# Certificates of general networks
MAX_KINK_RATIO = 1e-2  # |z − kink|, relative to its scale, up to which a kink may be active
# Source: chosen, as MAX_KINK_SINE. Test: here.
MAX_FIT_RATIO = 0.1  # ‖f − y‖/‖y‖ up to which a point of zero error is looked for
# Source: chosen: Gauss-Newton steps from further off leave max_distance. Test: here.
MIN_LIKQ = 1e-9  # σ_min/σ_max of the gradients of independent kinks
# Source: chosen: more than half of the digits of float64. Test: here.
MIN_GENERATOR_RATIO = 1e-8  # singular value, relative to the largest, of independent generators of symmetries
# Source: half of the digits of float64. Test: here.
MIN_SUBMERSION_RATIO = 1e-6  # smallest singular value of V or W, relative to the larger norm, of a product V W
# Source: chosen: the radius of a certificate is far smaller, and is checked against it. Test: here.
MAX_POOLING_TIE_RATIO = 1e-12  # difference of two numbers in a window of max-pooling, relative to their scale, of a tie
# Source: chosen: some thousand roundings. Test: here.
MATRIX_EIGENVALUE_ROUNDINGS = 100.0  # error of dense eigenvalues, per row, in spacings of floats at the largest
# Source: chosen: errors of a few were measured. Test: here.
MAX_ZERO_NORM_RATIO = 1e-6  # norm of a unit's weights, relative to its layer's largest, that a penalty takes to zero
# Source: chosen: far above rounding, far below the weights of a unit with a part in the outputs. Test: here.

# Polishing
MAX_POLISH_EXCURSION = 100.0  # distance, in units of max_distance, at which the search is given up
# Source: chosen: a search that went so far seldom comes back. Test: here.
MAX_UNRESOLVED_SINE = 1e-9  # |w·x|/(‖w‖‖x‖) that may be zero but for the rounding of a solution
# Source: chosen: seen in ill-conditioned steps of polish. Test: none, 32 polished networks.

# Planted problems
MAX_PLANTED_ROUNDINGS = 1e10  # unit roundoffs, relative to the residual, above which rounding hides the residual
# Source: 1e10 unit roundoffs leave six digits of the residual. Test: here.
MIN_PLANTED_SINE = 1e-6  # |w·x|/(‖w‖‖x‖) of a pre-activation off its kink
# Source: chosen: far above rounding. Test: none, 90 problems.
MAX_PLANTED_RESIDUAL = 10.0  # root mean square of a residual whose multipliers lie between the margin and 1
# Source: chosen: multipliers up to 1 stay comparable with the residual. Test: here.
MAX_PLANTED_EQUATION_ERROR = 1e-13  # error of the equations of a residual on kinks, relative to their size
# Source: chosen: some thousand roundings. Test: none, 45 problems.
MIN_PLANTED_FORCE_RATIO = 1e-2  # ‖g_i‖/√(Σ e_n² ‖x_n‖²) of the row that makes a saddle
# Source: chosen: the loss then falls by more than rounding. Test: none, 45 problems.
MAX_PLANTED_SLOPE_RATIO = 1e-14  # |Σ_n e_n f(w·x_n)| of that row, in the same units
# Source: chosen: some hundred roundings. Test: none, 45 problems.

# Labels
MAX_THRESHOLD_PRODUCT = 1e-12  # (ŷ − threshold)(y − threshold)/s² of a prediction on the threshold
# Source: part of the contract. Test: here.

# Least squares and rank
MAX_FIT_STATIONARITY = 1e-9  # ‖G r‖/(‖G‖_F ‖y‖) of a residual that an iteration has found
# Source: chosen: far above the goal of the iteration, 4 eps. Test: here.
MAX_DROPPED_SINGULAR_RATIO = 1e-11  # singular value, relative to the largest, that is dropped as a rounding error
# Source: chosen: solutions along smaller ones keep less than five digits. Test: here.
PROJECTION_ROUNDING_RATIO = 10 * FLOAT64_EPS  # rounding error that projection leaves, relative to the matrix before
# Source: chosen: a projection has two passes of some roundings. Test: here.
MIN_PIVOT_RATIO = 1e-9  # pivot, relative to the largest, from which the Gram matrix gives three digits or more
# Source: chosen: the rounding of a Gram matrix, about 1e-12, leaves three digits. Test: none, 55 graded spectra.
MAX_TRACE_PER_THRESHOLD = 1e12  # trace of a Gram matrix, relative to the threshold, up to which it resolves it
# Source: chosen: the rounding of a Gram matrix is about 1e-12 of its trace. Test: none, 55 graded spectra.
MIN_PIVOT_PER_THRESHOLD = 1e6  # pivot, relative to the threshold, of rows that are counted: σ² may be smaller
# Source: chosen: a thousand times MAX_PIVOT_PER_EIGENVALUE. Test: none, 55 graded spectra.
MAX_PIVOT_PER_EIGENVALUE = 1e3  # ratio of smallest pivot to smallest eigenvalue, up to which pivots are trusted
# Source: measured: below 30 in random regions. Test: none, 55 graded spectra.

# Existence of a minimum
MAX_DUAL_ERROR_RATIO = 1e-9  # error of the equations of a dual, relative to the bound that it proves
# Source: chosen: ten times MAX_INFEASIBILITY. Test: here.
MIN_OPEN_MARGIN = 1e-7  # margin that counts as positive; between this and the errors of duals nothing is decided
# Source: chosen: a hundred times MAX_DUAL_ERROR_RATIO. Test: here.
MAX_STATIONARITY = 1e-10  # ‖G e‖/(‖G‖_F ‖y‖) of a minimum
# Source: chosen: ten times below MAX_DUAL_ERROR_RATIO. Test: here.
MAX_ZERO_RATIO = 1e-12  # relative size of a number that is zero up to rounding
# Source: chosen: some thousand roundings. Test: here.
MIN_NONZERO_SINGULAR_RATIO = 1e-10  # singular value, relative to the largest, that is certainly not zero
# Source: chosen: far above the rounding of singular values. Test: here.
MIN_INPUT_LENGTH_RATIO = 1e-10  # length of an input, relative to the longest, whose part in G is not lost in rounding
# Source: chosen, as for singular values. Test: here.
MAX_INFEASIBILITY = 1e-10  # error of primal and dual constraints in linear programs
# Source: the smallest that HiGHS accepts. Test: none, 40 random regions.

# Random moves and kinks of any network
MIN_MOVE_SPACINGS = 8  # σ of a random move, in spacings of floats at 1
# Source: then 97 % of the weights change; with a tenth of it 73 %. Test: here.
MIN_COARSE_SPACING = 1e-4  # spacing of floats from which no step is both larger than rounding and small
# Source: float16 (1e-3) and bfloat16 (8e-3) are above, float32 (1e-7) is below. Test: here.
MAX_KINK_SPACINGS = 16.0  # distance of a unit on its kink, in spacings of floats at its layer's root mean square
# Source: the rounding of a dot product of some hundred terms. Test: here.
CHANCE_BAND_WIDTHS = 64.0  # width of the band, in units of that distance, whose units give the density of kinks
# Source: chosen: wide enough for several units, narrow enough for one density. Test: here.
MAX_ORDER_ERROR_RATIO = 0.5  # difference of two passes under the accepted order, relative to any other order
# Source: chosen: the right order leaves rounding errors. Test: test_what_cannot_be_told_is_refused.
MAX_REPEAT_ERROR_RATIO = 0.02  # difference of two runs on one sample, relative to that of two samples
# Source: bfloat16 rounds to 0.4 %. Test: none, test_kink_patterns.

# Eigenvalues
EIGENVALUE_ROUNDINGS = 16.0  # rounding error of an eigenvalue, in spacings of floats at the largest
# Source: chosen; an error of 2 was measured, of 300 rows in float32. Test: test_n_products_give_the_dense_answer.
MAX_BREAKDOWN_ROUNDINGS = 8.0  # part of a product outside the basis that counts as zero, in the same units
# Source: chosen: two orthogonalisations leave a few spacings. Test: test_n_products_give_the_dense_answer.

# Stationary points of any network
KINK_CROSSING_SPACINGS = 64.0  # length of a step across kinks, in spacings of floats relative to the weights
# Source: four times MAX_KINK_SPACINGS, so that the step passes the kink. Test: here.
MAX_JUMP_PER_GRADIENT = 0.5  # change of the gradient across kinks, relative to it, of a descent on all their sides
# Source: a gradient that changes by less than half of itself is zero on no side. Test: here.
GROWTH_ERROR_FACTOR = 4.0  # error of the growth off a kink, in units of that of its multiplier
# Source: chosen: multiplier and slope move by one each, and the face's curvature is not known. Test: here.
MIN_CHANCE_UNITS = 8.0  # units on kinks by chance from which their number is well known
# Source: a Poisson number of 8 is known to a third. Test: here.
MAX_EIGENVALUE_ERROR_RATIO = 0.02  # error of a negative λ_min, relative to the largest |λ|, that is small enough
# Source: chosen. Test: here.
EXPLAINED_CURVATURE_FACTOR = 4.0  # curvature that a gradient may explain, in units of that along a unit's scaling
# Source: chosen: along the scaling of one unit 1 is exact. Test: here.
LOSS_ROUNDINGS = 8.0  # rounding error of a loss, in spacings of floats
# Source: chosen: sums over batches round by a few spacings. Test: here.
MIN_LOSS_CHANGE_ERRORS = 16.0  # smallest significant change of a loss, in units of that error
# Source: chosen: a fall is then known to 6 %. Test: here.
TRIAL_STEP_FACTORS = (1.0, 4.0, 16.0, 64.0)  # lengths of trial steps, in units of the shortest significant one
# Source: chosen: powers of four, so that one is shorter than the way to a kink. Test: here.
MAX_FLAT_CURVATURE_RATIO = 1e-8  # curvature that counts as zero, relative to the largest eigenvalue
# Source: half of the digits of float64. Test: here.

# Newton's method
MAX_STEP_RESIDUAL_RATIO = 1e-4  # residual of a step in its quadratic model, relative to the gradient
# Source: chosen: with an exact model each step reduces the gradient by 1e4. Test: here.
MAX_GRADIENT_MISFIT = 0.1  # error of the predicted gradient, relative to the one before
# Source: a tail exp(-y) leaves 1/e of the gradient, a power of the step 1/4 or more. Test: here.
MAX_DECREASE_ERROR = 0.3  # error of the predicted decrease of the loss, relative to it
# Source: chosen. Test: here.
WEIGHT_ROUNDING_FACTOR = 0.125  # error of a gradient, relative to its change if all weights move by one spacing
# Source: chosen: rounding of weights is random, and rarely in the steepest direction. Test: here.
JITTER_SPACINGS = 64.0  # step for which the rounding of a gradient is measured, in spacings relative to the weights
# Source: chosen: all products round anew, and the curvature does not change. Test: none, test_second_order.
MAX_GRADIENT_ROUNDINGS = 8.0  # gradient, or difference of slopes, that counts as zero, in its rounding errors
# Source: chosen: the error is measured from one random step. Test: here.
ZERO_PREDICTION_SPACINGS = 256.0  # error of predictions, in spacings of floats, whose square counts as a loss of zero
# Source: chosen: the rounding of a forward pass of some layers. Test: here.
MAX_NEWTON_GAIN_RATIO = 1e-3  # decrease of the loss that Newton's method predicts at a minimum, relative to the loss
# Source: chosen. Test: here.
MAX_NEWTON_DISTANCE_RATIO = 1e-3  # distance of the minimum, relative to the weights
# Source: chosen: as max_distance of certificates. Test: here.
MAX_SLOPE_ERROR = 0.3  # difference of a slope from the one that the curvature predicts, relative to it
# Source: chosen: where the curvature ends, the difference is 1. Test: here.

# Directions without curvature
PROBE_SIZES = 12  # number of step sizes, each half of the one before
# Source: smallest step 2e-4: a fourth power of smaller ones is below rounding. Test: here.
CORRECTED_PROBE_SIZES = 7  # the same for steps with a correction across the direction
# Source: chosen: three sizes fix a power, four confirm it. Test: here.
MAX_PROBE_STEP_RATIO = 0.5  # largest step, relative to the scale of lengths
# Source: chosen. Test: here.
DESCENT_ORDERS = (2.5, 12.0)  # powers of the step with which a loss falls along a degenerate direction
# Source: orders 1 and 2 are tested elsewhere; 12 is chosen. Test: here.
MAX_ORDER_CHANGE = 0.5  # difference of these powers between one size and the next
# Source: half of the distance between two orders. Test: here.
MIN_FALL_RATIO = 0.3  # fall of the loss at each smaller size, relative to that of the power
# Source: chosen. Test: here.
CORRECTION_PRODUCTS = 12  # products of a correction
# Source: conjugate gradients are exact for a dozen different curvatures. Test: here.
FLAT_DRAWS = 3  # number of random flat directions
# Source: chosen. Test: none, test_second_order.
FLAT_MOVE_RATIOS: tuple[float, ...] = (1e-2, 1e-3)  # moves along them, relative to the scale of lengths
# Source: chosen: powers of larger moves show above rounding, but larger moves cross kinks. Test: here.
KINK_FLAT_MOVE_RATIO = 1e-4  # additional move for losses with kinks
# Source: chosen: kinks of trained networks are seldom nearer. Test: here.
FLOAT32_FLAT_MOVE_RATIOS: tuple[float, ...] = (1e-1, 3e-2)  # moves in float32, whose rounding hides smaller powers
# Source: chosen: fourth powers of smaller moves are below the rounding of float32. Test: here.
FLAT_PART_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 0.7, 0.8, 0.9, 1.0)  # of the weights' flat part, added or subtracted
# Source: chosen: a tail exp(-45) shows at 1/2. Test: here.
MIN_TAIL_RATIO = 2.0  # share at which the loss of a tail changes outwards, in units of that inwards
# Source: on the tangent of a manifold both shares are about equal. Test: here.
SHRINKING_STEPS = 7  # number of steps on a manifold towards smaller weights
# Source: chosen, with the size of a step. Test: here.
SHRINKING_STEP_SHARE = 0.16  # size of such a step, as a share of the flat part
# Source: chosen: with seven steps the flat part shrinks to 0.84^7 = 0.3. Test: here.
MAX_LOSS_CHANGE_RATIO = 1e-6  # change of the loss on that way, relative to it, above which the way crossed a kink
# Source: chosen: a tail changes the loss by less. Test: none, test_second_order.
MIN_FLAT_PART_RATIO = 1e-4  # flat part of a random vector, relative to it, that is no remainder of small curvature
# Source: chosen: ten thousand times MAX_FLAT_CURVATURE_RATIO. Test: none, test_second_order.
MAX_RETURN_MISFIT = 0.24  # misfit of the gradient on the way back to a manifold
# Source: along a tail or a power it is 1/4 or more. Test: here.
MIN_REMAINING_MOVE_SHARE = 0.5  # share of a move that must remain on the manifold
# Source: chosen: Newton's method undoes moves along a tail or a power. Test: here.
MAX_ABSENT_PART_RATIO = 1e-6  # flat part of the weights, relative to the scale of lengths, that counts as none
# Source: chosen. Test: none, test_second_order.

# Volumes of cones
MAX_EMPTY_CONE_ERROR = 64 * FLOAT64_EPS  # ‖λᵀB‖/Σ λ, λ ≥ 0, that proves a cone empty beyond rounding
# Source: chosen: the rounding of some ten normals. Test: here.
MIN_CENTRE_MARGIN = 1e-11  # margin at the centre of a cone from which float64 resolves its walls
# Source: chosen: walls are then known to five digits. Test: here.
MAX_CENTRE_DECREMENT = 1e-6  # squared Newton decrement at which a centre is accepted
# Source: chosen: the centre is known to 1e-3 of its ellipsoid. Test: none, test_annealing and test_cone.
MIN_LOG_ERROR = 1e-9  # error of a closed form, in nats, from the rounding of the normals
# Source: chosen: far above rounding, far below the error of sampling. Test: test_orthants_have_a_closed_form.
MAX_CLOSED_FORM_ERROR = 1e-3  # error, in nats, up to which a closed form is better than sampling
# Source: chosen: sampling has an error of about 0.03. Test: here.
MAX_SMALL_AREA = 1e-3  # area of a spherical polygon up to which its angles give it inaccurately
# Source: from there on the angles' rounding, 32 eps a side, is below 1e-11 of the area. Test: none, test_cone.
MIN_CORNER_COSINE = 0.5  # cosine of the angle from the middle of a small polygon to its corners
# Source: chosen: 60 degrees. Test: here.
MAX_IGNORED_LOG_CHANGE = 1e-6  # change of the log, in nats, up to which nearly orthogonal groups are orthogonal
# Source: chosen: far below the error of sampling. Test: here.
MIN_FULL_RANK_EIGENVALUE_RATIO = 1e-8  # eigenvalue of a Gram matrix, relative to the largest, that is not zero
# Source: chosen: far above the rounding of a Gram matrix; below, singular values decide. Test: none, test_cone.
MIN_BETA_VALUE = 1e-250  # value of the incomplete beta function from which it has all its digits
# Source: float64 ends at 1e-308; below, a series is used. Test: none, test_volume.
CHORD_END_FRACTION_FLOAT32 = 1e-6  # fraction of each part of a chord removed at its end, with distances in float32
# Source: chosen: some ten roundings of float32. Test: none, test_ep_sampling.
MIN_PARTICLE_DISTANCE = 1e-5  # distance from a wall, relative to that of the middle, that float32 resolves
# Source: chosen: some hundred roundings of float32. Test: none, test_ep_sampling.
MAX_SAME_DIRECTION_GAP = 1e-12  # distance of two unit vectors up to sign that are the same constraint
# Source: chosen: some thousand roundings. Test: here.
MAX_SITE_CHANGE = 1e-5  # change of a site in the last iteration, relative to its marginal
# Source: the log measure is stationary in the sites, so that its square is left. Test: here.
MAX_THIRD_ORDER_CORRECTION = 0.32  # in nats, of a cone whose log measure by EP is trusted
# Source: measured: up to 0.3 for random cones, more for near-duplicates, where EP is 0.6 to 1 off. Test: here.
MIN_SITE_VARIANCE = 1e-10  # smallest variance across a wall for which the sites keep five digits
# Source: chosen: rounding errors are relative to it. Test: here.
MAX_PRECISION_LOSS = 1 / 3  # fraction of the precision along a ray that one step of a chain may lose
# Source: from 1/2 on the weights have no variance. Test: test_islands_are_unbiased.
CHORD_END_FRACTION = 1e-9  # fraction of a chord removed at each end, so that rounding puts no point on a wall
# Source: chosen: far above rounding, far below the error of sampling. Test: none, test_annealing.
MIN_DEFINITE_EIGENVALUE_RATIO = 1e-9  # eigenvalue of GᵀG, relative to its mean diagonal, that is not zero
# Source: chosen: far above the rounding of a Gram matrix; below, singular values decide. Test: none, same counts.
INTERVAL_CONFIDENCE = 0.95  # confidence of an interval of a proportion
# Source: part of the contract. Test: here.
JOINT_INTERVAL_CONFIDENCE = 0.975  # confidence of each of two intervals that must be valid together
# Source: Bonferroni: 1 - 0.05 / 2. Test: here.

# Sampled learning coefficients
MAX_R_HAT = 1.05  # split R-hat of the losses of chains that agree
# Source: Vehtari et al. 2021 advise 1.01 for tails; a mean whose error is the spread of chains needs less. Test: here.
MAX_DISTANCE_R_HAT = 1.2  # the same of their distances to w*
# Source: four effective samples a chain, as MIN_SAMPLES_PER_CHAIN; they affect the mean by the losses only. Test: here.
MIN_SAMPLES_PER_CHAIN = 4  # effective samples of each chain, on average
# Source: chosen: with 16 chains the error of the mean is an eighth of the standard deviation. Test: here.
MAX_DRIFT_ERRORS = 4.5  # change from the first to the last third of the chains, in standard errors
# Source: of chains in their distribution one in 1e5 has more. Test: here.
MIN_ACCEPTANCE = 0.15  # acceptance of moves under Metropolis' rule
# Source: chosen: a fifth of the target of 0.75. Test: here.
MAX_GAIN_SHARE = 0.02  # loss below L(w*), as a share of the estimate
# Source: chosen: the estimate is too small by as much. Test: here.
MAX_HALVING_CHANGE = 0.02  # relative change of SGLD's mean by half the step size, beyond the errors of both runs
# Source: chosen: as much as MAX_GAIN_SHARE. Test: here.

# The detector
FAR_STEP_RATIO = 0.1  # step, relative to the weights, to a point where no gradient vanishes by chance
# Source: chosen. Test: none, test_foreign_detector.
NEAR_STEP_RATIO = 1e-6  # step, relative to the weights, off the kinks that they may lie on
# Source: chosen: above the rounding of float64. Test: none, test_foreign_detector.
MAX_EQUAL_DIFFERENCE_RATIO = 4e-10  # relative difference of two losses, or gradients, that are equal
# Source: the spacing of float64 at 1 to the power 0.6; a penalty of 1e-9 is then seen. Test: here.
MAX_TRAINING_DIFFERENCE_RATIO = 1e-4  # relative difference of a step in training mode from the same in eval mode
# Source: chosen: above the rounding of float32, below that of bfloat16 and float16. Test: none, test_model_tier.
MAX_APPROACHED_KINK_RATIO = 1e-4  # distance, relative to the layer, of a unit that may be on its way to a kink
# Source: chosen: training at a rate of 1e-4 stays as near. Test: none, it only chooses when to certify.
MAX_CLOSE_KINK_RATIO = 1e-6  # distance, relative to the layer's root mean square, of a kink that is not near by chance
# Source: chosen: of a thousand units one is that close by chance once in a thousand. Test: none, it only adds a note.
MAX_REDUCTION_ERROR_RATIO = 1e-3  # relative difference of two losses up to which a batch's loss is a sum, or a mean
# Source: chosen: above the rounding of float32. Test: here.

# Vital signs
MAX_DORMANT_RATIO = 0.025  # mean |activation| of a dormant unit, relative to the mean of its layer
# Source: Sokar et al. 2023, for networks that train on. Test: here.
MAX_CHANGING_SHARE = 0.01  # share of the pairs that still change, or of the weights' path, after they have settled
# Source: part of the contract: 1 %. Test: here.
MAX_ORDINARY_DEAD_SHARE = 0.1  # share of a layer's channels that may be dead without a finding
# Source: chosen: after usual initialisation a few of a hundred are. Test: here.
MAX_ORDINARY_DORMANT_SHARE = 0.25  # the same of its units that are dormant
# Source: chosen: sparse but healthy layers stay below. Test: none, test_pattern_findings.
MIN_ORDINARY_RANK = 2.0  # effective rank of a layer's activations without a finding
# Source: chosen: one direction and a little noise have less. Test: here.
MIN_GRADIENT_BALANCE = 1e-4  # gradient of a layer relative to its weights, in units of the largest of the layers
# Source: chosen: Adam's steps hide less; with SGD the layer then stands still. Test: here.
MAX_GRADIENT_GROWTH = 100.0  # norm of all gradients, in units of its median so far
# Source: chosen: noise of small batches stays below 10. Test: here.
NEAR_ZERO_GRADIENT_RATIO = 1e-3  # size of a gradient's entry that is near zero, relative to its root mean square
# Source: chosen: of a normal distribution, 0.08 % are smaller. Test: here.
