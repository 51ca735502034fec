use proptest::prelude::*;

use super::*;

/// FNV-1a of 64 bits, to compare with many recorded bytes at once.
fn fnv(bytes: impl IntoIterator<Item = u8>) -> u64 {
    bytes
        .into_iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// The float32 patterns of a linear congruential generator, without NaNs: they reach every exponent, and
/// places below every narrow format's last.
fn patterns() -> Vec<f32> {
    let mut state = 12345_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        f32::from_bits((state >> 32) as u32)
    };
    let values: Vec<f32> = (0..200_000).map(|_| next()).filter(|value| !value.is_nan()).collect();
    assert_eq!(values.len(), 199_175);
    values
}

/// Recorded from torch 2.11: `torch.tensor(patterns).to(dtype)`, the bytes' FNV-1a.
#[test]
fn conversions_are_torchs_on_recorded_patterns() {
    let values = patterns();
    let of_u8 = |convert: fn(f32) -> u8| fnv(values.iter().map(|value| convert(*value)));
    assert_eq!(of_u8(e4m3_from_f32), 0xdacd_ef59_10aa_27b9);
    assert_eq!(of_u8(e5m2_from_f32), 0xc11f_cdbb_ddb8_06aa);
    assert_eq!(
        fnv(values.iter().flat_map(|value| bf16_from_f32(*value).to_le_bytes())),
        0x7a58_e36d_cda4_21db
    );
    let halves = values.iter().flat_map(|value| f16_from_f32(*value).to_le_bytes());
    assert_eq!(fnv(halves), 0xeee2_1e02_d8d5_6bf9);
}

/// Recorded from torch 2.11: all 65536 bfloat16 values, NaNs too, to both types of 8 bits.
#[test]
fn float8_is_torchs_on_every_bfloat16() {
    let all = |convert: fn(f32) -> u8| fnv((0..=u16::MAX).map(|bits| convert(bf16_to_f32(bits))));
    assert_eq!(all(e4m3_from_f32), 0xfcf9_b068_35fb_1295);
    assert_eq!(all(e5m2_from_f32), 0xe1c1_40aa_89ae_5765);
}

/// What the bits mean by the formats' definition, in float64.
fn meaning(bits: u8, mantissa_bits: u32, offset: i32, infinite: bool) -> f64 {
    let magnitude = bits & 0x7f;
    let (exponent, mantissa) =
        (i32::from(magnitude >> mantissa_bits), magnitude & ((1 << mantissa_bits) - 1));
    let fraction = f64::from(mantissa) / f64::from(1 << mantissa_bits);
    let top = 0x7f_i32 >> mantissa_bits;
    let value = match exponent {
        0 => fraction * 2_f64.powi(1 - offset),
        _ if infinite && exponent == top => {
            if mantissa == 0 {
                f64::INFINITY
            } else {
                f64::NAN
            }
        }
        _ if !infinite && magnitude == 0x7f => f64::NAN,
        _ => (1.0 + fraction) * 2_f64.powi(exponent - offset),
    };
    if bits & 0x80 == 0 { value } else { -value }
}

#[test]
fn every_float8_means_what_its_format_says() {
    for bits in 0..=u8::MAX {
        for (got, meant) in
            [(e4m3_to_f32(bits), meaning(bits, 3, 7, false)), (e5m2_to_f32(bits), meaning(bits, 2, 15, true))]
        {
            assert_eq!(got.is_nan(), meant.is_nan(), "{bits:#x}");
            assert!(got.is_nan() || f64::from(got).to_bits() == meant.to_bits(), "{bits:#x}: {got}, {meant}");
        }
    }
}

#[test]
fn a_float8_comes_back_as_it_was() {
    for bits in 0..=u8::MAX {
        if !e4m3_to_f32(bits).is_nan() {
            assert_eq!(e4m3_from_f32(e4m3_to_f32(bits)), bits);
        }
        if !e5m2_to_f32(bits).is_nan() {
            assert_eq!(e5m2_from_f32(e5m2_to_f32(bits)), bits);
        }
    }
}

/// The nearest of all finite values by search, the even one of two that are equally near; above the largest,
/// what the next step of the grid would be stands for overflow.
fn nearest(value: f32, mantissa_bits: u32, bias: i32, infinite: bool) -> u8 {
    let magnitude = f64::from(value.abs());
    let largest = if infinite { 0x7b } else { 0x7e };
    let step = |bits: u8| meaning(bits, mantissa_bits, bias, infinite);
    let beyond = step(largest) + (step(largest) - step(largest - 1));
    let values = (0..=largest).map(|bits| (bits, step(bits))).chain([(largest + 1, beyond)]);
    let best = values.min_by(|(left, a), (right, b)| {
        let distance = |v: f64| (v - magnitude).abs();
        distance(*a).total_cmp(&distance(*b)).then_with(|| (left & 1).cmp(&(right & 1)))
    });
    best.map_or(0, |(bits, _)| bits) | if value.is_sign_negative() { 0x80 } else { 0 }
}

/// Against the crate `half`, an implementation of its own, in both directions.
#[test]
fn float16_is_halfs() {
    for bits in 0..=u16::MAX {
        let (got, wanted) = (f16_to_f32(bits), half::f16::from_bits(bits).to_f32());
        assert!(got.to_bits() == wanted.to_bits() || got.is_nan() && wanted.is_nan(), "{bits:#x}");
        assert!(got.is_nan() || f16_from_f32(got) == bits, "{bits:#x}");
    }
    for value in patterns() {
        assert_eq!(f16_from_f32(value), half::f16::from_f32(value).to_bits(), "{value}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]
    #[test]
    fn float8_is_the_nearest_by_search(sign in any::<bool>(), exponent in 90_u32..150, mantissa in 0_u32..1 << 23) {
        // Half of the mantissas are ties or near ties.
        let mantissa = if mantissa & 1 == 0 { mantissa & 0x7f_0000 } else { mantissa };
        let value = f32::from_bits((u32::from(sign) << 31) | (exponent << 23) | mantissa);
        prop_assert_eq!(e4m3_from_f32(value), nearest(value, 3, 7, false));
        prop_assert_eq!(e5m2_from_f32(value), nearest(value, 2, 15, true));
    }

    #[test]
    fn bfloat16_is_the_nearest(bits in any::<u32>()) {
        let value = f32::from_bits(bits);
        let got = bf16_to_f32(bf16_from_f32(value));
        prop_assert_eq!(got.is_nan(), value.is_nan());
        // Neighbours of the result are no nearer. Beyond the largest the next one is 2^128.
        let wide = |bits: u16| match bf16_to_f32(bits) {
            v if v.is_infinite() => 2_f64.powi(128).copysign(f64::from(v)),
            v => f64::from(v),
        };
        if value.is_finite() {
            let chosen = bf16_from_f32(value);
            let distance = |bits: u16| (wide(bits) - f64::from(value)).abs();
            for other in [chosen.wrapping_add(1), chosen.wrapping_sub(1)] {
                let neighbour = other & 0x8000 == chosen & 0x8000 && other & 0x7fff <= 0x7f80;
                let further = distance(other) > distance(chosen);
                let tie_to_even = distance(other).to_bits() == distance(chosen).to_bits() && chosen & 1 == 0;
                prop_assert!(!neighbour || further || tie_to_even, "{value} {chosen:#x} {other:#x}");
            }
        }
    }
}

#[test]
fn a_nan_stays_a_nan_of_its_sign() {
    for bits in [0x7f80_0001_u32, 0x7fc0_0000, 0x7fff_ffff] {
        for sign in [0, 0x8000_0000] {
            let value = f32::from_bits(bits | sign);
            assert!(bf16_to_f32(bf16_from_f32(value)).is_nan());
            assert_eq!(u32::from(bf16_from_f32(value) >> 15) << 31, sign);
            assert_eq!(u32::from(e4m3_from_f32(value)), 0x7f | sign >> 24);
            assert_eq!(u32::from(e5m2_from_f32(value)), 0x7f | sign >> 24);
        }
    }
}

#[test]
fn names_lead_back_to_types() {
    for dtype in DType::ALL {
        assert_eq!(DType::from_name(dtype.name()), Some(dtype));
    }
    assert_eq!(DType::from_name("float"), None);
}
