"""Tolerances: every number that decides a verdict, in one table.

Each has two lines of comment: what it bounds; and where its value comes from, then the test that fails if it is ten
times larger or smaller (``test_tolerances`` has one case for each constant that names no test). Functions read the
numbers here when they run, so that a test can change one. Sizes of blocks and numbers of draws, which decide only
how long something takes, stay where they are used.
"""

# Floats
UNIT_ROUNDOFF = 2.0**-53  # largest relative rounding error of one operation in float64
# x
FLOAT64_EPS = 2.0**-52  # spacing of float64 at 1
# x

# Certificates of two-layer networks
MAX_KINK_SINE = 1e-2  # |w·x|/(‖w‖‖x‖) up to which a sample may be moved onto its kink
# x
MIN_KINK_GAP_RATIO = 10.0  # ratio of two successive sorted sines that may separate kinks from the rest
# x
MAX_KINK_ROUNDINGS = 8.0  # |w·x| of a sample on its kink, in bounds on its rounding error
# x
MAX_ROUNDING_PER_TARGET = 1e-6  # rounding errors of ŷ, relative to y, up to which e = 0 can be tested
# x
MAX_ROUNDING_PER_RESIDUAL = 1e-6  # rounding errors of G e, relative to e, up to which G e = 0 can be tested
# x
MAX_ZERO_SINGULAR_RATIO = 1e-10  # singular value, relative to the largest, that counts as zero: kinks' inputs, faces
# x
MAX_OFF_SPAN_RATIO = 1e-12  # part of an input outside the span of a unit's kinks that counts as zero
# x
MIN_INDEPENDENT_SINGULAR_RATIO = 1e-7  # smallest singular value, relative to the largest, of independent kinks
# x
MAX_UNBALANCED_FORCE_RATIO = 1e-12  # part of a force that no multipliers balance, up to which it counts as zero
# x
LINEAR_PROGRAM_ERROR_RATIO = 1e-9  # result of a linear program, relative to its forces, that counts as zero
# x
MIN_KINK_EXIT_RATE = 1e-6  # rate at which every degenerate kink must be left
# x
MAX_KINK_EXIT_RATIO = 1e-4  # step that leaves degenerate kinks, relative to the weights
# x

# Polishing
MAX_POLISH_EXCURSION = 100.0  # distance, in units of max_distance, at which the search is given up
# x
MAX_UNRESOLVED_SINE = 1e-9  # |w·x|/(‖w‖‖x‖) that may be zero but for the rounding of a solution
# x

# Planted problems
MAX_PLANTED_ROUNDINGS = 1e10  # unit roundoffs, relative to the residual, above which rounding hides the residual
# x
MIN_PLANTED_SINE = 1e-6  # |w·x|/(‖w‖‖x‖) of a pre-activation off its kink
# x
MAX_PLANTED_RESIDUAL = 10.0  # root mean square of a residual whose multipliers lie between the margin and 1
# x
MAX_PLANTED_EQUATION_ERROR = 1e-13  # error of the equations of a residual on kinks, relative to their size
# x
MIN_PLANTED_FORCE_RATIO = 1e-2  # ‖g_i‖/√(Σ e_n² ‖x_n‖²) of the row that makes a saddle
# x
MAX_PLANTED_SLOPE_RATIO = 1e-14  # |Σ_n e_n f(w·x_n)| of that row, in the same units
# x

# Labels
MAX_THRESHOLD_PRODUCT = 1e-12  # (ŷ − threshold)(y − threshold)/s² of a prediction on the threshold
# x

# Least squares and rank
MAX_FIT_STATIONARITY = 1e-9  # ‖G r‖/(‖G‖_F ‖y‖) of a residual that an iteration has found
# x
MAX_DROPPED_SINGULAR_RATIO = 1e-11  # singular value, relative to the largest, that is dropped as a rounding error
# x
PROJECTION_ROUNDING_RATIO = 10 * FLOAT64_EPS  # rounding error that projection leaves, relative to the matrix before
# x
MIN_PIVOT_RATIO = 1e-9  # pivot, relative to the largest, from which the Gram matrix gives three digits or more
# x
MAX_TRACE_PER_THRESHOLD = 1e12  # trace of a Gram matrix, relative to the threshold, up to which it resolves it
# x
MIN_PIVOT_PER_THRESHOLD = 1e6  # pivot, relative to the threshold, of rows that are counted: σ² may be smaller
# x
MAX_PIVOT_PER_EIGENVALUE = 1e3  # ratio of smallest pivot to smallest eigenvalue, up to which pivots are trusted
# x

# Existence of a minimum
MAX_DUAL_ERROR_RATIO = 1e-9  # error of the equations of a dual, relative to the bound that it proves
# x
MIN_OPEN_MARGIN = 1e-7  # margin that counts as positive; between this and the errors of duals nothing is decided
# x
MAX_STATIONARITY = 1e-10  # ‖G e‖/(‖G‖_F ‖y‖) of a minimum
# x
MAX_ZERO_RATIO = 1e-12  # relative size of a number that is zero up to rounding
# x
MIN_NONZERO_SINGULAR_RATIO = 1e-10  # singular value, relative to the largest, that is certainly not zero
# x
MIN_INPUT_LENGTH_RATIO = 1e-10  # length of an input, relative to the longest, whose part in G is not lost in rounding
# x
MAX_INFEASIBILITY = 1e-10  # error of primal and dual constraints in linear programs
# x

# Random moves and kinks of any network
MIN_MOVE_SPACINGS = 8  # σ of a random move, in spacings of floats at 1
# x
MIN_COARSE_SPACING = 1e-4  # spacing of floats from which no step is both larger than rounding and small
# x
MAX_KINK_SPACINGS = 16.0  # distance of a unit on its kink, in spacings of floats at its layer's root mean square
# x
CHANCE_BAND_WIDTHS = 64.0  # width of the band, in units of that distance, whose units give the density of kinks
# x
MAX_ORDER_ERROR_RATIO = 0.5  # difference of two passes under the accepted order, relative to any other order
# x
MAX_REPEAT_ERROR_RATIO = 0.02  # difference of two runs on one sample, relative to that of two samples
# x

# Eigenvalues
EIGENVALUE_ROUNDINGS = 16.0  # rounding error of an eigenvalue, in spacings of floats at the largest
# x
MAX_BREAKDOWN_ROUNDINGS = 8.0  # part of a product outside the basis that counts as zero, in the same units
# x

# Stationary points of any network
KINK_CROSSING_SPACINGS = 64.0  # length of a step across kinks, in spacings of floats relative to the weights
# x
MAX_JUMP_PER_GRADIENT = 0.5  # change of the gradient across kinks, relative to it, of a descent on all their sides
# x
MIN_CHANCE_UNITS = 8.0  # units on kinks by chance from which their number is well known
# x
MAX_EIGENVALUE_ERROR_RATIO = 0.02  # error of a negative λ_min, relative to the largest |λ|, that is small enough
# x
EXPLAINED_CURVATURE_FACTOR = 4.0  # curvature that a gradient may explain, in units of that along a unit's scaling
# x
LOSS_ROUNDINGS = 8.0  # rounding error of a loss, in spacings of floats
# x
MIN_LOSS_CHANGE_ERRORS = 16.0  # smallest significant change of a loss, in units of that error
# x
TRIAL_STEP_FACTORS = (1.0, 4.0, 16.0, 64.0)  # lengths of trial steps, in units of the shortest significant one
# x
MAX_FLAT_CURVATURE_RATIO = 1e-8  # curvature that counts as zero, relative to the largest eigenvalue
# x

# Newton's method
MAX_STEP_RESIDUAL_RATIO = 1e-4  # residual of a step in its quadratic model, relative to the gradient
# x
MAX_GRADIENT_MISFIT = 0.1  # error of the predicted gradient, relative to the one before
# x
MAX_DECREASE_ERROR = 0.3  # error of the predicted decrease of the loss, relative to it
# x
WEIGHT_ROUNDING_FACTOR = 0.125  # error of a gradient, relative to its change if all weights move by one spacing
# x
JITTER_SPACINGS = 64.0  # step for which the rounding of a gradient is measured, in spacings relative to the weights
# x
MAX_GRADIENT_ROUNDINGS = 8.0  # gradient, or difference of slopes, that counts as zero, in its rounding errors
# x
ZERO_PREDICTION_SPACINGS = 256.0  # error of predictions, in spacings of floats, whose square counts as a loss of zero
# x
MAX_NEWTON_GAIN_RATIO = 1e-3  # decrease of the loss that Newton's method predicts at a minimum, relative to the loss
# x
MAX_NEWTON_DISTANCE_RATIO = 1e-3  # distance of the minimum, relative to the weights
# x
MAX_SLOPE_ERROR = 0.3  # difference of a slope from the one that the curvature predicts, relative to it
# x

# Directions without curvature
PROBE_SIZES = 12  # number of step sizes, each half of the one before
# x
CORRECTED_PROBE_SIZES = 7  # the same for steps with a correction across the direction
# x
MAX_PROBE_STEP_RATIO = 0.5  # largest step, relative to the scale of lengths
# x
DESCENT_ORDERS = (2.5, 12.0)  # powers of the step with which a loss falls along a degenerate direction
# x
MAX_ORDER_CHANGE = 0.5  # difference of these powers between one size and the next
# x
MIN_FALL_RATIO = 0.3  # fall of the loss at each smaller size, relative to that of the power
# x
CORRECTION_PRODUCTS = 12  # products of a correction
# x
FLAT_DRAWS = 3  # number of random flat directions
# x
FLAT_MOVE_RATIOS: tuple[float, ...] = (1e-2, 1e-3)  # moves along them, relative to the scale of lengths
# x
KINK_FLAT_MOVE_RATIO = 1e-4  # additional move for losses with kinks
# x
FLOAT32_FLAT_MOVE_RATIOS: tuple[float, ...] = (
    1e-1,
    3e-2,
)  # moves in float32, whose rounding hides a power of smaller ones
# x
FLAT_PART_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 0.7, 0.8, 0.9, 1.0)  # of the weights' flat part, added or subtracted
# x
MIN_TAIL_RATIO = 2.0  # share at which the loss of a tail changes outwards, in units of that inwards
# x
SHRINKING_STEPS = 7  # number of steps on a manifold towards smaller weights
# x
SHRINKING_STEP_SHARE = 0.16  # size of such a step, as a share of the flat part
# x
MAX_LOSS_CHANGE_RATIO = 1e-6  # change of the loss on that way, relative to it, above which the way crossed a kink
# x
MIN_FLAT_PART_RATIO = 1e-4  # flat part of a random vector, relative to it, that is no remainder of small curvature
# x
MAX_RETURN_MISFIT = 0.24  # misfit of the gradient on the way back to a manifold
# x
MIN_REMAINING_MOVE_SHARE = 0.5  # share of a move that must remain on the manifold
# x
MAX_ABSENT_PART_RATIO = 1e-6  # flat part of the weights, relative to the scale of lengths, that counts as none
# x

# Volumes of cones
MAX_EMPTY_CONE_ERROR = 64 * FLOAT64_EPS  # ‖λᵀB‖/Σ λ, λ ≥ 0, that proves a cone empty beyond rounding
# x
MIN_CENTRE_MARGIN = 1e-11  # margin at the centre of a cone from which float64 resolves its walls
# x
MAX_CENTRE_DECREMENT = 1e-6  # squared Newton decrement at which a centre is accepted
# x
MIN_LOG_ERROR = 1e-9  # error of a closed form, in nats, from the rounding of the normals
# x
MAX_CLOSED_FORM_ERROR = 1e-3  # error, in nats, up to which a closed form is better than sampling
# x
MAX_SMALL_AREA = 1e-3  # area of a spherical polygon up to which its angles give it inaccurately
# x
MIN_CORNER_COSINE = 0.5  # cosine of the angle from the middle of a small polygon to its corners
# x
MAX_IGNORED_LOG_CHANGE = 1e-6  # change of the log, in nats, up to which nearly orthogonal groups are orthogonal
# x
MIN_FULL_RANK_EIGENVALUE_RATIO = 1e-8  # eigenvalue of a Gram matrix, relative to the largest, that is not zero
# x
MIN_BETA_VALUE = 1e-250  # value of the incomplete beta function from which it has all its digits
# x
MAX_PRECISION_LOSS = 1 / 3  # fraction of the precision along a ray that one step of a chain may lose
# x
CHORD_END_FRACTION = 1e-9  # fraction of a chord removed at each end, so that rounding puts no point on a wall
# x
MIN_DEFINITE_EIGENVALUE_RATIO = 1e-9  # eigenvalue of GᵀG, relative to its mean diagonal, that is not zero
# x
INTERVAL_CONFIDENCE = 0.95  # confidence of an interval of a proportion
# x
JOINT_INTERVAL_CONFIDENCE = 0.975  # confidence of each of two intervals that must be valid together
# x

# The detector
FAR_STEP_RATIO = 0.1  # step, relative to the weights, to a point where no gradient vanishes by chance
# x
NEAR_STEP_RATIO = 1e-6  # step, relative to the weights, off the kinks that they may lie on
# x
MAX_EQUAL_DIFFERENCE_RATIO = 4e-10  # relative difference of two losses, or gradients, that are equal
# x
MAX_CLOSE_KINK_RATIO = 1e-6  # distance, relative to the layer's root mean square, of a kink that is not near by chance
# x
MAX_REDUCTION_ERROR_RATIO = 1e-3  # relative difference of two losses up to which a batch's loss is a sum, or a mean
# x
