//! The product on AMX: 16 tokens × 32 rows in two tiles of sums.
//!
//! A tile of activations is 16 tokens × 64 columns (`activations/tiles.rs`); a tile of weights is 16 quads × 16 rows, which is
//! what a tile of the artifact is once its nibbles are split. Splitting takes off the zero points, too, so that the sums of a
//! group are only to be scaled. The weights of a group stay in tiles while a block of tokens passes by; vector instructions scale
//! the sums of 16 tokens, from memory, while the tiles multiply the next 16. Everything but [`Tiles`] is portable.

use std::cell::RefCell;
use std::ops::Range;

use qbin_format::{QuantizedView, TILE_ROWS};

use super::Product;
use super::blocks::parts;
use super::output::{Line, Panels, Rows};
use super::panel::{Panel, VECTOR};
use crate::kernels::activations::{Activations, Group, TILE, Tiles as Arranged};
use crate::kernels::ahead::{LINE, fetch_near};
use crate::kernels::columns::BAND;
use crate::kernels::isa::{Isa, Vectorized};

/// Columns that are unpacked at a time: two panels of them take 32 KiB, and what belongs to them of 512 tokens 512 KiB.
const COLS: usize = 1024;
/// Columns of the smallest group.
const SMALLEST: usize = 32;
/// Rows of the result that are fetched before they are written: the third cache of CPUs with AMX is far from a core.
const AHEAD: usize = 16;
/// How far ahead the codes of each panel are fetched, in bytes.
const CODES_AHEAD: usize = 1024;
/// The same for where they are unpacked to, which is in the second cache.
const UNPACKED_AHEAD: usize = 1024;
/// Most panels for which the same columns of all tokens pass by, one pair of them after the other.
const STRIP: usize = 16;

/// What belongs to the codes of a group of two panels, `[panel][row]`.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Scales {
    /// f16, little endian.
    pub(super) scales: [[u8; 2 * TILE_ROWS]; 2],
    /// What is still to be taken off each code, negative, in the low halves; the high halves are 0. Read only if
    /// [`Operands::offsets`] says so.
    pub(super) offsets: [[u32; TILE_ROWS]; 2],
}

/// Some groups of two panels and some blocks of tiles of tokens.
pub(super) struct Operands<'a> {
    /// `[block][group][tile][step][token][depth]`, and a tile behind them, which may be read, too.
    pub(super) a: &'a [i8],
    /// Scales and sums, `[block][group][tile]`.
    pub(super) a_groups: &'a [Group],
    pub(super) blocks: usize,
    /// Groups of a block of activations, of which some are multiplied.
    pub(super) in_row: usize,
    /// `[group][panel][step][quad][row][4]`.
    pub(super) b: &'a [i8],
    /// The scales of both panels for each group.
    pub(super) b_groups: &'a [Scales],
    /// Whether there are offsets that are not 0.
    pub(super) offsets: bool,
    /// Whether these are the first groups, so that it does not matter what the results are before.
    pub(super) first: bool,
    /// Where lines begin, one for each tile of each group of each block, to be brought into the second cache meanwhile; a hint only.
    pub(super) ahead: *const u8,
}

/// Room for the sums of a tile, and for what the instructions have no register for.
#[repr(C, align(2048))]
pub(super) struct Scratch {
    /// `[panel, token, row]`.
    sums: [[[i32; TILE_ROWS]; TILE]; 2],
    state: State,
}

/// What there is to multiply.
#[repr(C)]
struct State {
    /// Blocks that are left.
    blocks: usize,
    /// Groups of a block.
    groups: usize,
    /// Tiles of a group.
    tiles: usize,
    /// Bytes between the activations of one block and the next.
    a_apart: usize,
    /// The same for their scales.
    a_groups_apart: usize,
    b: *const i8,
    b_groups: *const Scales,
    /// The first result of the block.
    y: *mut f32,
    /// What a tile's results are before the first group, unless it is what is there.
    before: *const f32,
    /// Bytes between the results before the group, from tile to tile.
    apart: usize,
}

impl Scratch {
    const EMPTY: Self = Self {
        sums: [[[0; TILE_ROWS]; TILE]; 2],
        state: State {
            blocks: 0,
            groups: 0,
            tiles: 0,
            a_apart: 0,
            a_groups_apart: 0,
            b: std::ptr::null(),
            b_groups: std::ptr::null(),
            y: std::ptr::null_mut(),
            before: std::ptr::null(),
            apart: 0,
        },
    };
}

/// The instructions. A value of an implementation is the proof that they may be executed.
pub(super) trait Tiles {
    /// Prepares for groups of so many `steps` of `depth` columns.
    fn configure(&mut self, depth: usize, steps: usize);

    /// Adds the product, group after group, to the rows of `y`, or writes it there.
    ///
    /// # Panics
    /// If an operand is too short.
    fn multiply(&mut self, operands: Operands, scratch: &mut Scratch, y: &mut Rows<'_>);

    /// Gives the tiles back, so that a switch of threads need not save them.
    fn release(&mut self);
}

thread_local! {
    static ROOM: RefCell<Room> = RefCell::default();
}

/// What a product needs, kept from one to the next.
#[derive(Default)]
struct Room {
    weights: Vec<Weights>,
    results: Vec<Line>,
}

/// Computes a product with activations `arranged`, with vector instructions of `isa` beside the tiles.
pub(super) fn run<T: Tiles>(isa: Isa, mut tiles: T, arranged: &Arranged, mut product: Product) {
    tiles.configure(arranged.depth, arranged.steps);
    ROOM.with_borrow_mut(|Room { weights, results }| {
        weights.resize(1, Weights::EMPTY);
        let panels = product.panels.clone();
        for start in panels.clone().step_by(STRIP) {
            let strip = start..panels.end.min(start + STRIP);
            let mut strip = Strip {
                isa,
                arranged,
                w: product.w,
                x: product.x,
                panels: strip,
                weights: &mut weights[0],
            };
            let tokens = product.x.tokens();
            match product.out.spacious(strip.panels.clone()) {
                Some(mut y) => strip.multiply(&mut tiles, &mut y),
                None => {
                    let mut y = Rows::of(results, tokens, strip.panels.len());
                    strip.multiply(&mut tiles, &mut y);
                    let (out, panels) = (&mut product.out, strip.panels);
                    isa.run(Write {
                        out,
                        tokens,
                        panels,
                        y,
                    });
                }
            }
        }
    });
    tiles.release();
}

/// Some panels, for which all tokens pass by.
struct Strip<'a> {
    isa: Isa,
    arranged: &'a Arranged,
    w: &'a QuantizedView<'a>,
    x: &'a Activations,
    panels: Range<usize>,
    weights: &'a mut Weights,
}

impl Strip<'_> {
    /// Writes the product to `y`.
    fn multiply<T: Tiles>(&mut self, matrix: &mut T, y: &mut Rows<'_>) {
        let Self {
            isa, arranged, x, ..
        } = *self;
        let mut scratch = Scratch::EMPTY;
        let pairs = self.panels.clone().step_by(2).enumerate();
        let parts = parts(0..x.groups(), COLS / x.group());
        let mut steps = parts
            .flat_map(|groups| pairs.clone().map(move |pair| (groups.clone(), pair)))
            .peekable();
        while let Some((groups, (pair, first))) = steps.next() {
            isa.run(Unpack {
                w: self.w,
                x,
                pair: [first, (first + 1).min(self.panels.end - 1)],
                groups: groups.clone(),
                weights: self.weights,
            });
            // After the last of these panels their neighbours are likely to be next.
            let mut ahead = match steps.peek() {
                Some((groups, (_, first))) => Ahead::of(self.w, x, *first, groups.clone()),
                None => Ahead::of(self.w, x, self.panels.end, 0..groups.len()),
            };
            for run in arranged.runs() {
                let (a, a_groups) = arranged.groups(run, groups.clone());
                let tiles = run.blocks * run.tiles;
                let mut y = y.pair(run.first * TILE..(run.first + tiles) * TILE, pair);
                let operands = Operands {
                    a,
                    a_groups,
                    blocks: run.blocks,
                    in_row: arranged.in_row,
                    b: self.weights.codes.as_flattened(),
                    b_groups: &self.weights.groups[..groups.len()],
                    offsets: self.weights.offsets,
                    first: groups.start == 0,
                    ahead: ahead.lines(groups.len() * tiles),
                };
                matrix.multiply(operands, &mut scratch, &mut y);
            }
        }
    }
}

/// The codes that are unpacked next: multiplying leaves memory idle.
struct Ahead<'a> {
    /// Those of two panels, of which the second may not exist.
    codes: [&'a [u8]; 2],
    at: usize,
}

impl<'a> Ahead<'a> {
    /// Those of two panels from `first` on, nothing where there are none.
    fn of(w: &QuantizedView<'a>, x: &Activations, first: usize, groups: Range<usize>) -> Self {
        let group = x.group() * TILE_ROWS * usize::from(w.scheme.bits) / 8;
        let part = |panel| match panel < w.rows.div_ceil(TILE_ROWS) {
            true => {
                let codes = Panel::of(w, panel).codes;
                &codes[groups.start * group..codes.len().min(groups.end * group)]
            }
            false => &[],
        };
        Self {
            codes: [part(first), part(first + 1)],
            at: 0,
        }
    }

    /// Where the next `count` lines begin. Some of the second panel may be left out.
    fn lines(&mut self, count: usize) -> *const u8 {
        let start = self.at;
        self.at += count * LINE;
        let [first, second] = self.codes;
        match start.checked_sub(first.len()) {
            None => first.as_ptr().wrapping_add(start),
            Some(start) => second.as_ptr().wrapping_add(start),
        }
    }
}

/// Hands over the results of some panels.
struct Write<'a, 'o, 'y> {
    out: &'a mut Panels<'o>,
    tokens: usize,
    panels: Range<usize>,
    y: Rows<'y>,
}

impl Vectorized for Write<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self {
            out,
            tokens,
            panels,
            mut y,
        } = self;
        for token in 0..tokens {
            for (panel, pair) in panels.clone().zip((0..).flat_map(|pair| [pair; 2])) {
                // Rows are far apart, and stores that wait for their lines would hold up all that follow.
                if token + AHEAD < tokens {
                    out.fetch(token + AHEAD, panel);
                }
                let values = y.pair(token..token + 1, pair).row(0)[(panel - panels.start) % 2];
                out.write(token, panel, &values);
            }
        }
    }
}

/// Some groups of two panels, ready for use.
#[derive(Clone)]
#[repr(C, align(64))]
struct Weights {
    /// `[group][panel][quad][row, 4]`.
    codes: [[i8; VECTOR]; 2 * COLS / 4],
    groups: [Scales; COLS / SMALLEST],
    /// Whether some offset is not 0.
    offsets: bool,
}

impl Weights {
    const EMPTY: Self = Self {
        codes: [[0; VECTOR]; 2 * COLS / 4],
        groups: [Scales {
            scales: [[0; 2 * TILE_ROWS]; 2],
            offsets: [[0; TILE_ROWS]; 2],
        }; COLS / SMALLEST],
        offsets: false,
    };
}

/// Fills [`Weights`].
struct Unpack<'a> {
    w: &'a QuantizedView<'a>,
    x: &'a Activations,
    pair: [usize; 2],
    groups: Range<usize>,
    weights: &'a mut Weights,
}

impl Vectorized for Unpack<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { w, x, .. } = self;
        let quads = x.group() / 4;
        let bits = w.scheme.bits;
        // A code of 8 bits less any zero point is no byte.
        self.weights.offsets = bits == 8 && !w.scheme.symmetric;
        let panels = self.pair.map(|panel| Panel::of(w, panel));
        let scales = self.weights.groups.iter_mut();
        let codes = self.weights.codes.chunks_exact_mut(2 * quads);
        for (group, (scales, codes)) in self.groups.zip(scales.zip(codes)) {
            let weight_group = w.scheme.group_of(group * x.group());
            for (at, panel) in panels.iter().enumerate() {
                scales.scales[at] = *panel.stored_scales(weight_group);
                if self.weights.offsets {
                    let zero_points = panel.stored_zero_points(weight_group);
                    scales.offsets[at] =
                        zero_points.map(|z| u32::from(128_u16.wrapping_sub(z.into())));
                }
                let taken = match bits {
                    4 if !w.scheme.symmetric => *panel.stored_zero_points(weight_group),
                    _ => [w.scheme.mid(); TILE_ROWS],
                };
                let codes = &mut codes[at * quads..][..quads];
                let (vectors, _) = panel.codes.as_chunks::<VECTOR>();
                let vectors = &vectors[group * quads * usize::from(bits) / 8..];
                let taken = taken.map(|zero| [zero; 4]);
                let taken: &[u8; VECTOR] = taken.as_flattened().try_into().expect("4 each");
                if bits == 4 {
                    for (vector, codes) in vectors.iter().zip(codes.as_chunks_mut::<2>().0) {
                        fetch_near(vector.as_ptr().wrapping_add(CODES_AHEAD));
                        for codes in codes.as_slice() {
                            fetch_near(codes.as_ptr().wrapping_add(UNPACKED_AHEAD));
                        }
                        let [low, high] = codes;
                        for i in 0..VECTOR {
                            low[i] = (vector[i] & 15).wrapping_sub(taken[i]).cast_signed();
                            high[i] = (vector[i] >> 4).wrapping_sub(taken[i]).cast_signed();
                        }
                    }
                } else {
                    for (vector, codes) in vectors.iter().zip(codes) {
                        fetch_near(vector.as_ptr().wrapping_add(CODES_AHEAD));
                        for i in 0..VECTOR {
                            codes[i] = vector[i].wrapping_sub(taken[i]).cast_signed();
                        }
                    }
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use instructions::Amx;

#[cfg(target_arch = "x86_64")]
mod instructions {
    //! [`Tiles`] by AMX-INT8. Nothing lives in tiles between two blocks of assembly.

    use std::arch::asm;
    use std::mem::offset_of;

    use super::{BAND, Group, Operands, Rows, Scales, Scratch, State, TILE, Tiles, VECTOR};
    use crate::kernels::isa::{Isa, Level};
    use crate::kernels::tile_config::TileConfig;

    /// Proof of AMX-INT8, and with it of AVX-512.
    pub(in super::super) struct Amx {
        depth: usize,
        steps: usize,
    }

    impl Amx {
        /// The proof, where `isa` gives it.
        pub(in super::super) fn of(isa: Isa) -> Option<Self> {
            (isa.level() == Level::Amx).then_some(Self { depth: 0, steps: 0 })
        }
    }

    /// What results are before the first group.
    #[repr(C, align(64))]
    struct Zeros([[f32; BAND]; TILE]);

    static ZEROS: Zeros = Zeros([[0.0; BAND]; TILE]);

    /// The sums of one of the 16 tokens before these and one panel, scaled and added to the result.
    macro_rules! scale {
        ($kind:ident, $panel:tt, $tens:literal, $r:literal) => {
            concat!(
                scale_of!($panel, $tens, $r),
                convert!($kind, $panel, $r),
                "vfmadd213ps zmm5, zmm4, zmmword ptr [{before} + 64*",
                $panel,
                " + 128*",
                $r,
                "]\n",
                "vmovaps zmmword ptr [{y} + 64*",
                $panel,
                " + 128*",
                $r,
                "], zmm5\n",
            )
        };
    }

    /// What a token's sums of one panel are scaled by; the second panel finds the token's part in the token's register.
    macro_rules! scale_of {
        (0, $tens:literal, $r:literal) => {
            concat!(
                "vbroadcastss zmm",
                $tens,
                $r,
                ", dword ptr [{a_groups} - 128 + 4*",
                $r,
                "]\n",
                "vmulps zmm4, zmm0, zmm",
                $tens,
                $r,
                "\n",
            )
        };
        (1, $tens:literal, $r:literal) => {
            concat!("vmulps zmm4, zmm1, zmm", $tens, $r, "\n")
        };
    }

    /// A token's sums in f32, less what its codes are still off.
    macro_rules! convert {
        (plain, $panel:tt, $r:literal) => {
            concat!(
                "vcvtdq2ps zmm5, zmmword ptr [{sums} + 1024*",
                $panel,
                " + 64*",
                $r,
                "]\n",
            )
        };
        (offsets, $panel:tt, $r:literal) => {
            concat!(
                "vmovdqa32 zmm5, zmmword ptr [{sums} + 1024*",
                $panel,
                " + 64*",
                $r,
                "]\n",
                "vpdpwssd zmm5, zmm3",
                $panel,
                ", dword ptr [{a_groups} - 64 + 4*",
                $r,
                "]{{1to16}}\n",
                "vcvtdq2ps zmm5, zmm5\n",
            )
        };
    }

    /// Brings codes of tokens that come soon into the first cache, with one panel of the two.
    macro_rules! fetch {
        (2, 0, $r:literal) => {
            concat!(
                "prefetcht0 byte ptr [{a} + 3072 + 128*",
                $r,
                "]\n",
                "prefetcht0 byte ptr [{a} + 3136 + 128*",
                $r,
                "]\n",
            )
        };
        (1, 0, $r:literal) => {
            concat!("prefetcht0 byte ptr [{a} + 3072 + 64*", $r, "]\n")
        };
        ($steps:tt, $panel:tt, $r:literal) => {
            ""
        };
    }

    /// Some of the 16 tokens.
    macro_rules! tokens {
        (none, $steps:tt, $panel:tt, $tens:literal, $($r:literal)*) => {
            ""
        };
        ($kind:ident, $steps:tt, $panel:tt, $tens:literal, $($r:literal)*) => {
            concat!($(scale!($kind, $panel, $tens, $r), fetch!($steps, $panel, $r)),*)
        };
    }

    /// The first eight of them, or the others. Their registers are 20 to 29 and 10 to 15.
    macro_rules! half {
        (0, $($of:tt)*) => {
            tokens!($($of)*, "2", "0" "1" "2" "3" "4" "5" "6" "7")
        };
        (1, $($of:tt)*) => {
            concat!(
                tokens!($($of)*, "2", "8" "9"),
                tokens!($($of)*, "", "10" "11" "12" "13" "14" "15"),
            )
        };
    }

    /// The products of 16 tokens and a panel, and meanwhile the sums of those before them; in the middle of it the sums of the
    /// other panel are stored, which are complete by then.
    macro_rules! panel {
        ($kind:ident, $steps:tt, $tile:tt, $row:tt, $panel:tt) => {
            concat!(
                "tilezero tmm",
                $panel,
                "\n",
                products!($steps, $tile, $row, $panel),
                half!(0, $kind, $steps, $panel),
                store!($kind, $panel),
                half!(1, $kind, $steps, $panel),
            )
        };
    }

    /// Those products; what is multiplied next takes the place of activations as soon as they have been multiplied by both panels.
    macro_rules! products {
        (1, $tile:tt, $row:tt, 0) => {
            "tdpbssd tmm0, tmm2, tmm4\n"
        };
        (1, $tile:tt, $row:tt, 1) => {
            concat!(
                "tdpbssd tmm1, tmm2, tmm6\n",
                activations!(2, $row, "0", $tile)
            )
        };
        (2, $tile:tt, $row:tt, 0) => {
            "tdpbssd tmm0, tmm2, tmm4\ntdpbssd tmm0, tmm3, tmm5\n"
        };
        (2, $tile:tt, $row:tt, 1) => {
            concat!(
                "tdpbssd tmm1, tmm2, tmm6\n",
                activations!(2, $row, "0", "2048"),
                "tdpbssd tmm1, tmm3, tmm7\n",
                activations!(3, $row, "1024", "2048"),
            )
        };
    }

    /// Reads a step of 16 tokens, these or the next.
    macro_rules! activations {
        ($to:tt, $row:tt, $step:tt, $next:tt) => {
            concat!(
                "tileloaddt1 tmm",
                $to,
                ", [{a} + ",
                $step,
                " + ",
                $next,
                " + ",
                $row,
                "*{half}]\n",
            )
        };
    }

    /// Reads all steps of 16 tokens.
    macro_rules! first_activations {
        (1, $row:tt) => {
            activations!(2, $row, "0", "0")
        };
        (2, $row:tt) => {
            concat!(
                activations!(2, $row, "0", "0"),
                activations!(3, $row, "1024", "0")
            )
        };
    }

    /// Stores the sums of the panel that is not being multiplied; before the first tokens there are none of the second.
    macro_rules! store {
        (none, 0) => {
            ""
        };
        ($kind:ident, 0) => {
            "tilestored [{sums} + 2*{half} + 1024], tmm1\n"
        };
        ($kind:ident, 1) => {
            "tilestored [{sums} + 2*{half}], tmm0\n"
        };
    }

    /// The products of 16 tokens, from which it goes on to the next.
    macro_rules! tile {
        ($kind:ident, $steps:tt, $tile:tt, $row:tt) => {
            concat!(
                panel!($kind, $steps, $tile, $row, 0),
                panel!($kind, $steps, $tile, $row, 1),
                "add {a}, ",
                $steps,
                "*",
                $tile,
                "\n",
                "add {a_groups}, 128\n",
                "prefetcht1 byte ptr [{ahead}]\n",
                "add {ahead}, 64\n",
            )
        };
    }

    /// Reads the codes of a group.
    macro_rules! weights {
        (1, $tile:literal) => {
            concat!(
                "tileloaddt1 tmm4, [{b} + 2*{half}]\n",
                "tileloaddt1 tmm6, [{b} + 2*{half} + ",
                $tile,
                "]\n",
            )
        };
        (2, $tile:literal) => {
            concat!(
                "tileloaddt1 tmm4, [{b} + 2*{half}]\n",
                "tileloaddt1 tmm5, [{b} + 2*{half} + ",
                $tile,
                "]\n",
                "tileloaddt1 tmm6, [{b} + 2*{half} + 2*",
                $tile,
                "]\n",
                "tileloaddt1 tmm7, [{b} + 2*{half} + 3*",
                $tile,
                "]\n",
            )
        };
    }

    /// Reads what two panels' rows are scaled by, to registers 0 and 1, and what their codes are off, to 30 and 31.
    macro_rules! scales {
        () => {
            "vcvtph2ps zmm0, ymmword ptr [{b_groups}]
             vcvtph2ps zmm1, ymmword ptr [{b_groups} + 32]
             vmovdqa32 zmm30, zmmword ptr [{b_groups} + 64]
             vmovdqa32 zmm31, zmmword ptr [{b_groups} + 128]"
        };
    }

    /// All tiles of all groups of all blocks; the sums of the last tile of a group are scaled while the next group begins.
    macro_rules! multiply {
        ($kind:ident, $steps:tt, $tile:tt, $row:tt, $x:expr, $scratch:expr, $y:expr) => {{
            asm!(
                weights!($steps, $tile),
                scales!(),
                first_activations!($steps, $row),
                tile!(none, $steps, $tile, $row),
                // Where the results of a block are before its first group.
                "2:",
                "mov {before}, qword ptr [{sums} + {BEFORE}]",
                "xor {left:e}, {left:e}",
                "test {before}, {before}",
                "jnz 3f",
                "mov {before}, {y}",
                "mov {left:e}, 16*128",
                "3:",
                "mov qword ptr [{sums} + {APART}], {left}",
                // The tiles of a group.
                "4:",
                "mov {left}, qword ptr [{sums} + {TILES}]",
                "dec {left}",
                "jz 6f",
                "5:",
                tile!($kind, $steps, $tile, $row),
                "add {y}, 16*128",
                "add {before}, qword ptr [{sums} + {APART}]",
                "dec {left}",
                "jnz 5b",
                "6:",
                "dec {groups}",
                "jz 7f",
                // The next group.
                concat!("add {b}, 2*", $steps, "*", $tile),
                weights!($steps, $tile),
                tile!($kind, $steps, $tile, $row),
                "mov {y}, qword ptr [{sums} + {Y}]",
                "mov {before}, {y}",
                "mov qword ptr [{sums} + {APART}], 16*128",
                "add {b_groups}, 192",
                scales!(),
                "jmp 4b",
                "7:",
                "dec qword ptr [{sums} + {BLOCKS}]",
                "jz 8f",
                // The next block.
                "mov {groups}, qword ptr [{sums} + {GROUPS}]",
                "mov {b}, qword ptr [{sums} + {B}]",
                "add {a}, qword ptr [{sums} + {A_APART}]",
                first_activations!($steps, $row),
                weights!($steps, $tile),
                tile!($kind, $steps, $tile, $row),
                "add {a_groups}, qword ptr [{sums} + {A_GROUPS_APART}]",
                "add {y}, 16*128",
                "mov qword ptr [{sums} + {Y}], {y}",
                "mov {b_groups}, qword ptr [{sums} + {B_GROUPS}]",
                scales!(),
                "jmp 2b",
                "8:",
                store!($kind, 0),
                half!(0, $kind, 0, 0),
                half!(1, $kind, 0, 0),
                half!(0, $kind, 0, 1),
                half!(1, $kind, 0, 1),
                // Instructions without vectors of this width would wait for what is in the upper halves.
                "vzeroupper",
                a = inout(reg) $x.a.as_ptr() => _,
                a_groups = inout(reg) $x.a_groups.as_ptr() => _,
                b = inout(reg) $x.b.as_ptr() => _,
                b_groups = inout(reg) $x.b_groups.as_ptr() => _,
                groups = inout(reg) $x.b_groups.len() => _,
                left = out(reg) _,
                y = inout(reg) $y.as_mut_ptr() => _,
                before = out(reg) _,
                ahead = inout(reg) $x.ahead => _,
                sums = in(reg) $scratch,
                half = in(reg) VECTOR / 2,
                BLOCKS = const offset_of!(Scratch, state.blocks),
                GROUPS = const offset_of!(Scratch, state.groups),
                TILES = const offset_of!(Scratch, state.tiles),
                A_APART = const offset_of!(Scratch, state.a_apart),
                A_GROUPS_APART = const offset_of!(Scratch, state.a_groups_apart),
                B = const offset_of!(Scratch, state.b),
                B_GROUPS = const offset_of!(Scratch, state.b_groups),
                Y = const offset_of!(Scratch, state.y),
                BEFORE = const offset_of!(Scratch, state.before),
                APART = const offset_of!(Scratch, state.apart),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _, out("zmm4") _, out("zmm5") _,
                out("zmm6") _, out("zmm7") _, out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
                out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _, out("zmm20") _, out("zmm21") _,
                out("zmm22") _, out("zmm23") _, out("zmm24") _, out("zmm25") _, out("zmm26") _, out("zmm27") _,
                out("zmm28") _, out("zmm29") _, out("zmm30") _, out("zmm31") _,
                options(nostack),
            )
        }};
    }

    impl Tiles for Amx {
        fn configure(&mut self, depth: usize, steps: usize) {
            assert!(depth == 32 || depth == 64, "depth {depth}");
            let mut config = TileConfig::WHOLE;
            config.row_bytes[2..4].fill(depth as u16);
            config.rows[4..8].fill(depth as u8 / 4);
            // SAFETY: an `Amx` exists only where detection found AMX and the operating system granted its tiles; the
            // instruction reads these 64 bytes.
            unsafe {
                asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly));
            }
            (self.depth, self.steps) = (depth, steps);
        }

        fn multiply(&mut self, x: Operands, scratch: &mut Scratch, y: &mut Rows<'_>) {
            const { assert!(size_of::<Group>() == 128 && size_of::<Scales>() == 192) };
            const { assert!(offset_of!(Scratch, sums) == 0 && BAND * size_of::<f32>() == 128) };
            let (groups, blocks) = (x.b_groups.len(), x.blocks);
            let bytes = self.steps * self.depth * TILE;
            let tiles = y.rows() / (blocks * TILE);
            assert!(
                bytes > 0 && tiles > 0 && groups > 0 && groups <= x.in_row,
                "{groups} of {} groups of {blocks} blocks of {tiles} tiles of {bytes} bytes",
                x.in_row
            );
            let a_tiles = ((blocks - 1) * x.in_row + groups) * tiles;
            assert!(
                x.a.len() >= (a_tiles + 1) * bytes
                    && x.a_groups.len() >= a_tiles
                    && x.b.len() >= 2 * groups * bytes,
                "operands of {groups} groups of {a_tiles} tiles of {bytes} bytes"
            );
            let apart = (x.in_row - groups) * tiles;
            scratch.state = State {
                blocks,
                groups,
                tiles,
                a_apart: apart * bytes,
                a_groups_apart: apart * size_of::<Group>(),
                b: x.b.as_ptr(),
                b_groups: x.b_groups.as_ptr(),
                y: y.as_mut_ptr(),
                before: match x.first {
                    true => ZEROS.0.as_flattened().as_ptr(),
                    false => std::ptr::null(),
                },
                apart: 0,
            };
            // SAFETY: tiles as above, and AVX-512 is part of the level. With the shapes of `configure` the loads stay inside
            // the lengths just checked, those of the next activations, too; sums and results are whole values, aligned to
            // vectors.
            unsafe {
                match (self.depth, self.steps, x.offsets) {
                    (64, 2, false) => multiply!(plain, 2, "1024", "2", x, scratch, y),
                    (64, 2, true) => multiply!(offsets, 2, "1024", "2", x, scratch, y),
                    (64, 1, false) => multiply!(plain, 1, "1024", "2", x, scratch, y),
                    (64, 1, true) => multiply!(offsets, 1, "1024", "2", x, scratch, y),
                    (32, 1, false) => multiply!(plain, 1, "512", "1", x, scratch, y),
                    (32, 1, true) => multiply!(offsets, 1, "512", "1", x, scratch, y),
                    (depth, steps, _) => unreachable!("{steps} steps of {depth} columns"),
                }
            }
        }

        fn release(&mut self) {
            self.depth = 0;
            // SAFETY: tiles as above.
            unsafe { asm!("tilerelease", options(nostack, nomem)) }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    //! The same algorithm on tiles in software.

    use half::f16;

    use super::*;

    /// Tiles as Intel's definition of `TILELOADD`, `TDPBSSD` and `TILESTORED` has them (Instruction Set Reference,
    /// volume 2), and the scaling after them.
    pub(in super::super) struct Software {
        depth: usize,
        steps: usize,
    }

    impl Software {
        pub(in super::super) fn new() -> Self {
            Self { depth: 0, steps: 0 }
        }

        /// `TDPBSSD`: `c[m][n] += Σ_k Σ_i a[m][4k + i] · b[k][4n + i]`, both signed.
        fn dot(&self, c: &mut [[i32; TILE_ROWS]; TILE], a: &[i8], b: &[i8]) {
            for (m, c) in c.iter_mut().enumerate() {
                for k in 0..self.depth / 4 {
                    for (n, c) in c.iter_mut().enumerate() {
                        for i in 0..4 {
                            *c += i32::from(a[m * self.depth + 4 * k + i])
                                * i32::from(b[k * VECTOR + 4 * n + i]);
                        }
                    }
                }
            }
        }
    }

    impl Tiles for Software {
        fn configure(&mut self, depth: usize, steps: usize) {
            assert!(depth == 32 || depth == 64);
            (self.depth, self.steps) = (depth, steps);
        }

        fn multiply(&mut self, x: Operands, _: &mut Scratch, y: &mut Rows<'_>) {
            let bytes = self.steps * self.depth * TILE;
            let tiles = y.rows() / (x.blocks * TILE);
            let groups = x.b_groups.iter().enumerate();
            for (block, (group, scales)) in
                (0..x.blocks).flat_map(|block| groups.clone().map(move |group| (block, group)))
            {
                for tile in 0..tiles {
                    let at = (block * x.in_row + group) * tiles + tile;
                    let a = &x.a[at * bytes..][..bytes];
                    let of_tokens = &x.a_groups[at];
                    for panel in 0..2 {
                        let b = &x.b[(2 * group + panel) * bytes..][..bytes];
                        let mut sums = [[0; TILE_ROWS]; TILE];
                        for (a, b) in a
                            .chunks_exact(self.depth * TILE)
                            .zip(b.chunks_exact(self.depth * TILE))
                        {
                            self.dot(&mut sums, a, b);
                        }
                        for (token, sums) in sums.iter().enumerate() {
                            let row = (block * tiles + tile) * TILE + token;
                            let y = &mut y.row(row)[panel];
                            if x.first && group == 0 {
                                *y = [0.0; TILE_ROWS];
                            }
                            for row in 0..TILE_ROWS {
                                let offset = match x.offsets {
                                    true => i32::from(scales.offsets[panel][row] as u16 as i16),
                                    false => 0,
                                };
                                let sum = sums[row] + offset * of_tokens.sums[token];
                                let scale = scales.scales[panel].as_chunks().0[row];
                                let scale =
                                    f16::from_le_bytes(scale).to_f32() * of_tokens.scales[token];
                                y[row] = scale.mul_add(sum as f32, y[row]);
                            }
                        }
                    }
                }
            }
        }

        fn release(&mut self) {
            self.depth = 0;
        }
    }
}
