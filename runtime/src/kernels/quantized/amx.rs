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
use crate::kernels::activations::{Activations, BLOCK, Group, TILE, Tiles as Arranged};
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
const CODES_AHEAD: usize = 2048;
/// Most panels for which the same columns of all tokens pass by, one pair of them after the other.
const STRIP: usize = 16;

/// What belongs to the codes of a group of two panels, `[panel][row]`.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Scales {
    pub(super) scales: [[f32; TILE_ROWS]; 2],
    /// What is still to be taken off each code, negative, in the low halves; the high halves are 0.
    pub(super) offsets: [[u32; TILE_ROWS]; 2],
}

/// Some groups of two panels and some tiles of tokens.
pub(super) struct Operands<'a> {
    /// `[group][tile][step][token][depth]`.
    pub(super) a: &'a [i8],
    /// Scales and sums, `[group][tile]`.
    pub(super) a_groups: &'a [Group],
    /// `[group][panel][step][quad][row][4]`.
    pub(super) b: &'a [i8],
    /// The scales of both panels for each group.
    pub(super) b_groups: &'a [Scales],
    /// Whether there are offsets that are not 0.
    pub(super) offsets: bool,
    /// Whether these are the first groups, so that it does not matter what the results are before.
    pub(super) first: bool,
    /// Where lines begin, one for each tile of each group, to be brought into the second cache meanwhile; a hint only.
    pub(super) ahead: *const u8,
}

/// Room for the sums of a tile, and for what the instructions have no register for.
#[repr(C, align(2048))]
pub(super) struct Scratch {
    /// `[panel, token, row]`.
    sums: [[[i32; TILE_ROWS]; TILE]; 2],
    /// Tiles of tokens.
    tiles: usize,
    /// The first result.
    y: *mut f32,
    /// Bytes between the results before the group, from tile to tile.
    apart: usize,
}

impl Scratch {
    const EMPTY: Self = Self {
        sums: [[[0; TILE_ROWS]; TILE]; 2],
        tiles: 0,
        y: std::ptr::null_mut(),
        apart: 0,
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
    fn multiply<T: Tiles>(&mut self, tiles: &mut T, y: &mut Rows<'_>) {
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
            for block in 0..arranged.blocks() {
                let (a, a_groups) = arranged.groups(block, groups.clone());
                let rows =
                    block * BLOCK * TILE..(block * BLOCK + a_groups.len() / groups.len()) * TILE;
                let mut y = y.pair(rows, pair);
                let operands = Operands {
                    a,
                    a_groups,
                    b: self.weights.codes.as_flattened(),
                    b_groups: &self.weights.groups[..groups.len()],
                    offsets: self.weights.offsets,
                    first: groups.start == 0,
                    ahead: ahead.lines(a_groups.len()),
                };
                tiles.multiply(operands, &mut scratch, &mut y);
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
            scales: [[0.0; TILE_ROWS]; 2],
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
                let zero_points = panel.zero_points(weight_group);
                let taken = if bits == 4 {
                    zero_points
                } else {
                    [128; TILE_ROWS]
                };
                scales.scales[at] = panel.scales(weight_group);
                scales.offsets[at] =
                    std::array::from_fn(|row| u32::from((taken[row] - zero_points[row]) as u16));
                let codes = &mut codes[at * quads..][..quads];
                let (vectors, _) = panel.codes.as_chunks::<VECTOR>();
                let vectors = &vectors[group * quads * usize::from(bits) / 8..];
                let taken = taken.map(|zero| [zero as u8; 4]);
                let taken: &[u8; VECTOR] = taken.as_flattened().try_into().expect("4 each");
                if bits == 4 {
                    for (vector, codes) in vectors.iter().zip(codes.as_chunks_mut::<2>().0) {
                        fetch_near(vector.as_ptr().wrapping_add(CODES_AHEAD));
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

    use super::{BAND, Group, Operands, Rows, Scales, Scratch, TILE, Tiles, VECTOR};
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
        ($kind:ident, $panel:tt, $r:literal) => {
            concat!(
                "vmulps zmm4, zmm",
                $panel,
                ", dword ptr [{a_groups} - 128 + 4*",
                $r,
                "]{{1to16}}\n",
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
                "vpdpwssd zmm5, zmm2",
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
        (none, $steps:tt, $panel:tt, $($r:literal)*) => {
            ""
        };
        ($kind:ident, $steps:tt, $panel:tt, $($r:literal)*) => {
            concat!($(scale!($kind, $panel, $r), fetch!($steps, $panel, $r)),*)
        };
    }

    /// The products of 16 tokens and a panel, and meanwhile the sums of those before them; in the middle of it the sums of the
    /// other panel are stored, which are complete by then.
    macro_rules! panel {
        ($kind:ident, $steps:tt, $row:literal, $panel:tt) => {
            concat!(
                "tilezero tmm",
                $panel,
                "\n",
                products!($steps, $row, $panel),
                tokens!($kind, $steps, $panel, "0" "1" "2" "3" "4" "5" "6" "7"),
                store!($kind, $panel),
                tokens!($kind, $steps, $panel, "8" "9" "10" "11" "12" "13" "14" "15"),
            )
        };
    }

    /// Those products.
    macro_rules! products {
        (1, $row:literal, 0) => {
            concat!(
                "tileloadd tmm2, [{a} + ",
                $row,
                "*{half}]\n",
                "tdpbssd tmm0, tmm2, tmm4\n",
            )
        };
        (1, $row:literal, 1) => {
            "tdpbssd tmm1, tmm2, tmm6\n"
        };
        (2, $row:literal, 0) => {
            concat!(
                "tileloadd tmm2, [{a} + ",
                $row,
                "*{half}]\n",
                "tileloadd tmm3, [{a} + 1024 + ",
                $row,
                "*{half}]\n",
                "tdpbssd tmm0, tmm2, tmm4\n",
                "tdpbssd tmm0, tmm3, tmm5\n",
            )
        };
        (2, $row:literal, 1) => {
            "tdpbssd tmm1, tmm2, tmm6\ntdpbssd tmm1, tmm3, tmm7\n"
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
        ($kind:ident, $steps:tt, $tile:literal, $row:literal) => {
            concat!(
                panel!($kind, $steps, $row, 0),
                panel!($kind, $steps, $row, 1),
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
                "tileloadd tmm4, [{b} + 2*{half}]\n",
                "tileloadd tmm6, [{b} + 2*{half} + ",
                $tile,
                "]\n",
            )
        };
        (2, $tile:literal) => {
            concat!(
                "tileloadd tmm4, [{b} + 2*{half}]\n",
                "tileloadd tmm5, [{b} + 2*{half} + ",
                $tile,
                "]\n",
                "tileloadd tmm6, [{b} + 2*{half} + 2*",
                $tile,
                "]\n",
                "tileloadd tmm7, [{b} + 2*{half} + 3*",
                $tile,
                "]\n",
            )
        };
    }

    /// Reads what two panels' rows are scaled by, to registers 0 and 1, and what their codes are off, to 20 and 21.
    macro_rules! scales {
        () => {
            "vmovaps zmm0, zmmword ptr [{b_groups}]
             vmovaps zmm1, zmmword ptr [{b_groups} + 64]
             vmovdqa32 zmm20, zmmword ptr [{b_groups} + 128]
             vmovdqa32 zmm21, zmmword ptr [{b_groups} + 192]"
        };
    }

    /// All tiles of all groups; the sums of the last tile of a group are scaled while the next group begins.
    macro_rules! multiply {
        ($kind:ident, $steps:tt, $tile:literal, $row:literal, $x:expr, $scratch:expr, $y:expr) => {{
            let (before, apart) = match $x.first {
                true => (ZEROS.0.as_flattened().as_ptr(), 0),
                false => ($y.as_mut_ptr().cast_const(), TILE * BAND * size_of::<f32>()),
            };
            ($scratch.tiles, $scratch.y, $scratch.apart) = ($y.rows() / TILE, $y.as_mut_ptr(), apart);
            asm!(
                weights!($steps, $tile),
                scales!(),
                tile!(none, $steps, $tile, $row),
                "2:",
                "mov {left}, qword ptr [{sums} + 2048]",
                "dec {left}",
                "jz 4f",
                "3:",
                tile!($kind, $steps, $tile, $row),
                "add {y}, 16*128",
                "add {before}, qword ptr [{sums} + 2064]",
                "dec {left}",
                "jnz 3b",
                "4:",
                "dec {groups}",
                "jz 5f",
                concat!("add {b}, 2*", $steps, "*", $tile),
                weights!($steps, $tile),
                tile!($kind, $steps, $tile, $row),
                "mov {y}, qword ptr [{sums} + 2056]",
                "mov {before}, {y}",
                "mov qword ptr [{sums} + 2064], 16*128",
                "add {b_groups}, 256",
                scales!(),
                "jmp 2b",
                "5:",
                store!($kind, 0),
                tokens!($kind, 0, 0, "0" "1" "2" "3" "4" "5" "6" "7" "8" "9" "10" "11" "12" "13" "14" "15"),
                tokens!($kind, 0, 1, "0" "1" "2" "3" "4" "5" "6" "7" "8" "9" "10" "11" "12" "13" "14" "15"),
                a = inout(reg) $x.a.as_ptr() => _,
                a_groups = inout(reg) $x.a_groups.as_ptr() => _,
                b = inout(reg) $x.b.as_ptr() => _,
                b_groups = inout(reg) $x.b_groups.as_ptr() => _,
                groups = inout(reg) $x.b_groups.len() => _,
                left = out(reg) _,
                y = inout(reg) $y.as_mut_ptr() => _,
                before = inout(reg) before => _,
                ahead = inout(reg) $x.ahead => _,
                sums = in(reg) $scratch,
                half = in(reg) VECTOR / 2,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                out("zmm0") _, out("zmm1") _, out("zmm4") _, out("zmm5") _, out("zmm20") _,
                out("zmm21") _,
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
            const { assert!(size_of::<Group>() == 128 && size_of::<Scales>() == 256) };
            const { assert!(offset_of!(Scratch, tiles) == 2048 && offset_of!(Scratch, y) == 2056) };
            const { assert!(offset_of!(Scratch, apart) == 2064) };
            const { assert!(BAND * size_of::<f32>() == 128) };
            let (depth, tiles, groups) = (self.depth, y.rows() / TILE, x.b_groups.len());
            let bytes = self.steps * depth * TILE;
            assert!(
                bytes > 0 && tiles > 0 && groups > 0,
                "{groups} groups of {tiles} tiles of {bytes} bytes"
            );
            assert!(
                x.a.len() >= groups * tiles * bytes
                    && x.a_groups.len() >= groups * tiles
                    && x.b.len() >= 2 * groups * bytes,
                "operands of {groups} groups of {tiles} tiles of {bytes} bytes"
            );
            // SAFETY: tiles as above, and AVX-512 is part of the level. With the shapes of `configure` the loads stay inside
            // the lengths just checked; sums and results are whole values, aligned to vectors.
            unsafe {
                match (depth, self.steps, x.offsets) {
                    (64, 2, false) => multiply!(plain, 2, "1024", "2", x, scratch, y),
                    (64, 2, true) => multiply!(offsets, 2, "1024", "2", x, scratch, y),
                    (64, 1, false) => multiply!(plain, 1, "1024", "2", x, scratch, y),
                    (64, 1, true) => multiply!(offsets, 1, "1024", "2", x, scratch, y),
                    (32, 1, false) => multiply!(plain, 1, "512", "1", x, scratch, y),
                    (32, 1, true) => multiply!(offsets, 1, "512", "1", x, scratch, y),
                    (_, steps, _) => unreachable!("{steps} steps of {depth} columns"),
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
            let tiles = y.rows() / TILE;
            for (group, scales) in x.b_groups.iter().enumerate() {
                for tile in 0..tiles {
                    let a = &x.a[(group * tiles + tile) * bytes..][..bytes];
                    let of_tokens = &x.a_groups[group * tiles + tile];
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
                            let y = &mut y.row(tile * TILE + token)[panel];
                            if x.first && group == 0 {
                                *y = [0.0; TILE_ROWS];
                            }
                            for row in 0..TILE_ROWS {
                                let offset = i32::from(scales.offsets[panel][row] as u16 as i16);
                                assert!(x.offsets || offset == 0);
                                let sum = sums[row] + offset * of_tokens.sums[token];
                                let scale = scales.scales[panel][row] * of_tokens.scales[token];
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
