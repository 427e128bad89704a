;; The hot part of a GPT's forward pass, in WebAssembly SIMD; model.js calls it. Matrices are int8 in groups of 64 weights
;; with a float scale each. Inputs lose nothing that a float holds: a group of them becomes whole numbers of 16 bits and 16
;; more bits of what is left, so that products are sums of whole numbers. What is told is what smalllm tells in float32 from
;; the same rounded weights, up to the order of float sums.
;;
;; All lengths are in numbers, all places in bytes. Buffers reach to a multiple of 64 numbers and hold zeros beyond their end.
;; Built by: python tests/build_decoder.py

(module
  (import "page" "memory" (memory 1))

  ;; ── numbers ──

  ;; 2^x as power_of_two in native/vectors.h: relative error under 3e-7, exactly 0 below -126.5.
  (func $power_of_two (param $x v128) (result v128)
    (local $whole v128) (local $rest v128) (local $sum v128)
    (local.set $x
      (f32x4.min
        (f32x4.max (local.get $x) (v128.const f32x4 -127 -127 -127 -127))
        (v128.const f32x4 127 127 127 127)))
    (local.set $whole (f32x4.nearest (local.get $x)))
    (local.set $rest (f32x4.sub (local.get $x) (local.get $whole)))
    (local.set $sum (v128.const f32x4 1.535336188e-4 1.535336188e-4 1.535336188e-4 1.535336188e-4))
    (local.set $sum
      (f32x4.add (f32x4.mul (local.get $sum) (local.get $rest))
        (v128.const f32x4 1.339887440e-3 1.339887440e-3 1.339887440e-3 1.339887440e-3)))
    (local.set $sum
      (f32x4.add (f32x4.mul (local.get $sum) (local.get $rest))
        (v128.const f32x4 9.618437357e-3 9.618437357e-3 9.618437357e-3 9.618437357e-3)))
    (local.set $sum
      (f32x4.add (f32x4.mul (local.get $sum) (local.get $rest))
        (v128.const f32x4 5.550332548e-2 5.550332548e-2 5.550332548e-2 5.550332548e-2)))
    (local.set $sum
      (f32x4.add (f32x4.mul (local.get $sum) (local.get $rest))
        (v128.const f32x4 2.402264791e-1 2.402264791e-1 2.402264791e-1 2.402264791e-1)))
    (local.set $sum
      (f32x4.add (f32x4.mul (local.get $sum) (local.get $rest))
        (v128.const f32x4 6.931472028e-1 6.931472028e-1 6.931472028e-1 6.931472028e-1)))
    (local.set $sum
      (f32x4.add (f32x4.mul (local.get $sum) (local.get $rest)) (v128.const f32x4 1 1 1 1)))
    (f32x4.mul
      (local.get $sum)
      (i32x4.shl
        (i32x4.add (i32x4.trunc_sat_f32x4_s (local.get $whole)) (v128.const i32x4 127 127 127 127))
        (i32.const 23))))

  ;; Sum of the 16 lanes of four vectors, halves first.
  (func $total (param $a v128) (param $b v128) (param $c v128) (param $d v128) (result f32)
    (local.set $a
      (f32x4.add
        (f32x4.add (local.get $a) (local.get $c))
        (f32x4.add (local.get $b) (local.get $d))))
    (f32.add
      (f32.add (f32x4.extract_lane 0 (local.get $a)) (f32x4.extract_lane 2 (local.get $a)))
      (f32.add (f32x4.extract_lane 1 (local.get $a)) (f32x4.extract_lane 3 (local.get $a)))))

  (func $greatest (param $a v128) (result f32)
    (f32.max
      (f32.max (f32x4.extract_lane 0 (local.get $a)) (f32x4.extract_lane 1 (local.get $a)))
      (f32.max (f32x4.extract_lane 2 (local.get $a)) (f32x4.extract_lane 3 (local.get $a)))))

  ;; ── products ──

  ;; Groups of 64 floats at $x become whole numbers and scales. x = scale (high + low / 65534), both of 16 bits; at $to lie
  ;; four highs, then their four lows, and so on.
  (func (export "quantize") (param $x i32) (param $groups i32) (param $to i32) (param $scales i32)
    (local $end i32) (local $from i32) (local $most v128) (local $size f32) (local $inverse v128)
    (local $exact v128) (local $high v128)
    (loop $group
      (local.set $end (i32.add (local.get $x) (i32.const 256)))
      (local.set $from (local.get $x))
      (local.set $most (v128.const f32x4 0 0 0 0))
      (loop $next
        (local.set $most (f32x4.max (local.get $most) (f32x4.abs (v128.load (local.get $from)))))
        (local.set $from (i32.add (local.get $from) (i32.const 16)))
        (br_if $next (i32.lt_u (local.get $from) (local.get $end))))
      (local.set $size (call $greatest (local.get $most)))
      (f32.store (local.get $scales) (f32.div (local.get $size) (f32.const 32767)))
      (local.set $inverse
        (f32x4.splat
          (select
            (f32.div (f32.const 32767) (local.get $size))
            (f32.const 0)
            (f32.gt (local.get $size) (f32.const 0)))))
      (loop $next
        (local.set $exact (f32x4.mul (v128.load (local.get $x)) (local.get $inverse)))
        (local.set $high (f32x4.nearest (local.get $exact)))
        (v128.store (local.get $to)
          (i16x8.narrow_i32x4_s
            (i32x4.trunc_sat_f32x4_s (local.get $high))
            (i32x4.trunc_sat_f32x4_s
              (f32x4.nearest
                (f32x4.mul
                  (f32x4.sub (local.get $exact) (local.get $high))
                  (v128.const f32x4 65534 65534 65534 65534))))))
        (local.set $to (i32.add (local.get $to) (i32.const 16)))
        (br_if $next (i32.lt_u (local.tee $x (i32.add (local.get $x) (i32.const 16))) (local.get $end))))
      (local.set $scales (i32.add (local.get $scales) (i32.const 4)))
      (br_if $group (local.tee $groups (i32.sub (local.get $groups) (i32.const 1))))))

  ;; Weights times a quantized row: 16 outputs a panel. A panel has, for each group, 16 steps of 64 bytes (four inputs of
  ;; sixteen outputs: of each four outputs the first two inputs, then the other two) and 16 scales. $bias may be 0; with $add
  ;; the sums are added to what stands at $out. No sum overflows: 64 x 127 x 32767 < 2^31.
  (func (export "product")
    (param $w i32) (param $x i32) (param $scales i32) (param $groups i32) (param $panels i32)
    (param $out i32) (param $bias i32) (param $add i32)
    (local $row i32) (local $scale i32) (local $group i32) (local $end i32)
    (local $x0 v128) (local $x2 v128) (local $y0 v128) (local $y2 v128) (local $four v128) (local $first v128)
    (local $a v128) (local $b v128) (local $c v128) (local $d v128) ;; sums of highs
    (local $e v128) (local $f v128) (local $g v128) (local $h v128) ;; and of lows
    (local $p v128) (local $q v128) (local $r v128) (local $s v128) (local $rest v128)
    (local.set $rest (f32x4.splat (f32.div (f32.const 1) (f32.const 65534))))
    (loop $panel
      (local.set $p (v128.const i32x4 0 0 0 0))
      (local.set $q (v128.const i32x4 0 0 0 0))
      (local.set $r (v128.const i32x4 0 0 0 0))
      (local.set $s (v128.const i32x4 0 0 0 0))
      (local.set $row (local.get $x))
      (local.set $scale (local.get $scales))
      (local.set $group (local.get $groups))
      (loop $next
        (local.set $a (v128.const i32x4 0 0 0 0))
        (local.set $b (v128.const i32x4 0 0 0 0))
        (local.set $c (v128.const i32x4 0 0 0 0))
        (local.set $d (v128.const i32x4 0 0 0 0))
        (local.set $e (v128.const i32x4 0 0 0 0))
        (local.set $f (v128.const i32x4 0 0 0 0))
        (local.set $g (v128.const i32x4 0 0 0 0))
        (local.set $h (v128.const i32x4 0 0 0 0))
        (local.set $end (i32.add (local.get $w) (i32.const 1024)))
        (loop $step
          (local.set $x0 (v128.load32_splat (local.get $row)))
          (local.set $x2 (v128.load32_splat offset=4 (local.get $row)))
          (local.set $y0 (v128.load32_splat offset=8 (local.get $row)))
          (local.set $y2 (v128.load32_splat offset=12 (local.get $row)))
          (local.set $four (v128.load (local.get $w)))
          (local.set $first (i16x8.extend_low_i8x16_s (local.get $four)))
          (local.set $four (i16x8.extend_high_i8x16_s (local.get $four)))
          (local.set $a
            (i32x4.add (local.get $a)
              (i32x4.add
                (i32x4.dot_i16x8_s (local.get $first) (local.get $x0))
                (i32x4.dot_i16x8_s (local.get $four) (local.get $x2)))))
          (local.set $e
            (i32x4.add (local.get $e)
              (i32x4.add
                (i32x4.dot_i16x8_s (local.get $first) (local.get $y0))
                (i32x4.dot_i16x8_s (local.get $four) (local.get $y2)))))
          (local.set $four (v128.load offset=16 (local.get $w)))
          (local.set $first (i16x8.extend_low_i8x16_s (local.get $four)))
          (local.set $four (i16x8.extend_high_i8x16_s (local.get $four)))
          (local.set $b
            (i32x4.add (local.get $b)
              (i32x4.add
                (i32x4.dot_i16x8_s (local.get $first) (local.get $x0))
                (i32x4.dot_i16x8_s (local.get $four) (local.get $x2)))))
          (local.set $f
            (i32x4.add (local.get $f)
              (i32x4.add
                (i32x4.dot_i16x8_s (local.get $first) (local.get $y0))
                (i32x4.dot_i16x8_s (local.get $four) (local.get $y2)))))
          (local.set $four (v128.load offset=32 (local.get $w)))
          (local.set $first (i16x8.extend_low_i8x16_s (local.get $four)))
          (local.set $four (i16x8.extend_high_i8x16_s (local.get $four)))
          (local.set $c
            (i32x4.add (local.get $c)
              (i32x4.add
                (i32x4.dot_i16x8_s (local.get $first) (local.get $x0))
                (i32x4.dot_i16x8_s (local.get $four) (local.get $x2)))))
          (local.set $g
            (i32x4.add (local.get $g)
              (i32x4.add
                (i32x4.dot_i16x8_s (local.get $first) (local.get $y0))
                (i32x4.dot_i16x8_s (local.get $four) (local.get $y2)))))
          (local.set $four (v128.load offset=48 (local.get $w)))
          (local.set $first (i16x8.extend_low_i8x16_s (local.get $four)))
          (local.set $four (i16x8.extend_high_i8x16_s (local.get $four)))
          (local.set $d
            (i32x4.add (local.get $d)
              (i32x4.add
                (i32x4.dot_i16x8_s (local.get $first) (local.get $x0))
                (i32x4.dot_i16x8_s (local.get $four) (local.get $x2)))))
          (local.set $h
            (i32x4.add (local.get $h)
              (i32x4.add
                (i32x4.dot_i16x8_s (local.get $first) (local.get $y0))
                (i32x4.dot_i16x8_s (local.get $four) (local.get $y2)))))
          (local.set $row (i32.add (local.get $row) (i32.const 16)))
          (br_if $step (i32.lt_u (local.tee $w (i32.add (local.get $w) (i32.const 64))) (local.get $end))))
        (local.set $x0 (v128.load32_splat (local.get $scale)))
        (local.set $p
          (f32x4.add (local.get $p)
            (f32x4.mul
              (f32x4.add
                (f32x4.convert_i32x4_s (local.get $a))
                (f32x4.mul (f32x4.convert_i32x4_s (local.get $e)) (local.get $rest)))
              (f32x4.mul (v128.load (local.get $w)) (local.get $x0)))))
        (local.set $q
          (f32x4.add (local.get $q)
            (f32x4.mul
              (f32x4.add
                (f32x4.convert_i32x4_s (local.get $b))
                (f32x4.mul (f32x4.convert_i32x4_s (local.get $f)) (local.get $rest)))
              (f32x4.mul (v128.load offset=16 (local.get $w)) (local.get $x0)))))
        (local.set $r
          (f32x4.add (local.get $r)
            (f32x4.mul
              (f32x4.add
                (f32x4.convert_i32x4_s (local.get $c))
                (f32x4.mul (f32x4.convert_i32x4_s (local.get $g)) (local.get $rest)))
              (f32x4.mul (v128.load offset=32 (local.get $w)) (local.get $x0)))))
        (local.set $s
          (f32x4.add (local.get $s)
            (f32x4.mul
              (f32x4.add
                (f32x4.convert_i32x4_s (local.get $d))
                (f32x4.mul (f32x4.convert_i32x4_s (local.get $h)) (local.get $rest)))
              (f32x4.mul (v128.load offset=48 (local.get $w)) (local.get $x0)))))
        (local.set $w (i32.add (local.get $w) (i32.const 64)))
        (local.set $scale (i32.add (local.get $scale) (i32.const 4)))
        (br_if $next (local.tee $group (i32.sub (local.get $group) (i32.const 1)))))
      (if (local.get $bias)
        (then
          (local.set $p (f32x4.add (local.get $p) (v128.load (local.get $bias))))
          (local.set $q (f32x4.add (local.get $q) (v128.load offset=16 (local.get $bias))))
          (local.set $r (f32x4.add (local.get $r) (v128.load offset=32 (local.get $bias))))
          (local.set $s (f32x4.add (local.get $s) (v128.load offset=48 (local.get $bias))))
          (local.set $bias (i32.add (local.get $bias) (i32.const 64)))))
      (if (local.get $add)
        (then
          (local.set $p (f32x4.add (v128.load (local.get $out)) (local.get $p)))
          (local.set $q (f32x4.add (v128.load offset=16 (local.get $out)) (local.get $q)))
          (local.set $r (f32x4.add (v128.load offset=32 (local.get $out)) (local.get $r)))
          (local.set $s (f32x4.add (v128.load offset=48 (local.get $out)) (local.get $s)))))
      (v128.store (local.get $out) (local.get $p))
      (v128.store offset=16 (local.get $out) (local.get $q))
      (v128.store offset=32 (local.get $out) (local.get $r))
      (v128.store offset=48 (local.get $out) (local.get $s))
      (local.set $out (i32.add (local.get $out) (i32.const 64)))
      (br_if $panel (local.tee $panels (i32.sub (local.get $panels) (i32.const 1))))))

  ;; ── norms and positions ──

  ;; Sum of x - $mean over $count numbers at $x, of its square with $squared.
  (func $sum (param $x i32) (param $count i32) (param $mean f32) (param $squared i32) (result f32)
    (local $a v128) (local $b v128) (local $c v128) (local $d v128) (local $means v128) (local $all f32) (local $end i32)
    (local $e v128) (local $f v128) (local $g v128) (local $h v128) (local $one f32)
    (local.set $means (f32x4.splat (local.get $mean)))
    (local.set $end (i32.add (local.get $x) (i32.and (i32.shl (local.get $count) (i32.const 2)) (i32.const -64))))
    (block $done
      (loop $next
        (br_if $done (i32.ge_u (local.get $x) (local.get $end)))
        (local.set $e (f32x4.sub (v128.load (local.get $x)) (local.get $means)))
        (local.set $f (f32x4.sub (v128.load offset=16 (local.get $x)) (local.get $means)))
        (local.set $g (f32x4.sub (v128.load offset=32 (local.get $x)) (local.get $means)))
        (local.set $h (f32x4.sub (v128.load offset=48 (local.get $x)) (local.get $means)))
        (if (local.get $squared)
          (then
            (local.set $e (f32x4.mul (local.get $e) (local.get $e)))
            (local.set $f (f32x4.mul (local.get $f) (local.get $f)))
            (local.set $g (f32x4.mul (local.get $g) (local.get $g)))
            (local.set $h (f32x4.mul (local.get $h) (local.get $h)))))
        (local.set $a (f32x4.add (local.get $a) (local.get $e)))
        (local.set $b (f32x4.add (local.get $b) (local.get $f)))
        (local.set $c (f32x4.add (local.get $c) (local.get $g)))
        (local.set $d (f32x4.add (local.get $d) (local.get $h)))
        (local.set $x (i32.add (local.get $x) (i32.const 64)))
        (br $next)))
    (local.set $all (call $total (local.get $a) (local.get $b) (local.get $c) (local.get $d)))
    (local.set $end (i32.add (local.get $x) (i32.and (i32.shl (local.get $count) (i32.const 2)) (i32.const 63))))
    (block $done
      (loop $next
        (br_if $done (i32.ge_u (local.get $x) (local.get $end)))
        (local.set $one (f32.sub (f32.load (local.get $x)) (local.get $mean)))
        (if (local.get $squared) (then (local.set $one (f32.mul (local.get $one) (local.get $one)))))
        (local.set $all (f32.add (local.get $all) (local.get $one)))
        (local.set $x (i32.add (local.get $x) (i32.const 4)))
        (br $next)))
    (local.get $all))

  ;; RMSNorm, or LayerNorm with $centre; $bias may be 0. Weight and bias end in zeros up to a multiple of 16, and so does $to.
  (func (export "norm")
    (param $x i32) (param $to i32) (param $weight i32) (param $bias i32) (param $count i32) (param $centre i32)
    (local $mean f32) (local $means v128) (local $inverse v128) (local $y v128) (local $end i32)
    (if (local.get $centre)
      (then
        (local.set $mean
          (f32.div
            (call $sum (local.get $x) (local.get $count) (f32.const 0) (i32.const 0))
            (f32.convert_i32_s (local.get $count))))))
    (local.set $means (f32x4.splat (local.get $mean)))
    (local.set $inverse
      (f32x4.splat
        (f32.div (f32.const 1)
          (f32.sqrt
            (f32.add
              (f32.div
                (call $sum (local.get $x) (local.get $count) (local.get $mean) (i32.const 1))
                (f32.convert_i32_s (local.get $count)))
              (f32.const 1e-5))))))
    (local.set $end (i32.add (local.get $to) (i32.shl (local.get $count) (i32.const 2))))
    (loop $next
      (local.set $y
        (f32x4.mul
          (f32x4.mul (f32x4.sub (v128.load (local.get $x)) (local.get $means)) (local.get $inverse))
          (v128.load (local.get $weight))))
      (if (local.get $bias)
        (then
          (local.set $y (f32x4.add (local.get $y) (v128.load (local.get $bias))))
          (local.set $bias (i32.add (local.get $bias) (i32.const 16)))))
      (v128.store (local.get $to) (local.get $y))
      (local.set $x (i32.add (local.get $x) (i32.const 16)))
      (local.set $weight (i32.add (local.get $weight) (i32.const 16)))
      (local.set $to (i32.add (local.get $to) (i32.const 16)))
      (br_if $next (i32.lt_u (local.get $to) (local.get $end)))))

  ;; RoPE, in halves: x[d], x[d + half] turned by cos[d] and sin[d].
  (func (export "rotate") (param $x i32) (param $cos i32) (param $sin i32) (param $half i32)
    (local $other i32) (local $end i32) (local $low f32) (local $high f32)
    (local.set $other (i32.add (local.get $x) (i32.shl (local.get $half) (i32.const 2))))
    (local.set $end (local.get $other))
    (loop $next
      (local.set $low (f32.load (local.get $x)))
      (local.set $high (f32.load (local.get $other)))
      (f32.store (local.get $x)
        (f32.sub
          (f32.mul (local.get $low) (f32.load (local.get $cos)))
          (f32.mul (local.get $high) (f32.load (local.get $sin)))))
      (f32.store (local.get $other)
        (f32.add
          (f32.mul (local.get $high) (f32.load (local.get $cos)))
          (f32.mul (local.get $low) (f32.load (local.get $sin)))))
      (local.set $cos (i32.add (local.get $cos) (i32.const 4)))
      (local.set $sin (i32.add (local.get $sin) (i32.const 4)))
      (local.set $other (i32.add (local.get $other) (i32.const 4)))
      (br_if $next (i32.lt_u (local.tee $x (i32.add (local.get $x) (i32.const 4))) (local.get $end)))))

  ;; ── attention ──

  ;; $count numbers go to places $stride bytes apart.
  (func (export "place") (param $x i32) (param $to i32) (param $count i32) (param $stride i32)
    (loop $next
      (i32.store (local.get $to) (i32.load (local.get $x)))
      (local.set $x (i32.add (local.get $x) (i32.const 4)))
      (local.set $to (i32.add (local.get $to) (local.get $stride)))
      (br_if $next (local.tee $count (i32.sub (local.get $count) (i32.const 1))))))

  ;; One head of one position: softmax(query keys' $scale) values. Keys lie in panels of 16 positions, [$width] rows of 16
  ;; each; values are rows of $padded numbers, of which as many are written to $out. $scores has room for whole panels.
  (func (export "attend")
    (param $query i32) (param $keys i32) (param $values i32) (param $seen i32) (param $width i32) (param $padded i32)
    (param $scale f32) (param $scores i32) (param $out i32)
    (local $at i32) (local $end i32) (local $last i32) (local $row i32) (local $value i32) (local $most v128)
    (local $a v128) (local $b v128) (local $c v128) (local $d v128) (local $one v128)
    (local.set $last
      (i32.add (local.get $scores)
        (i32.shl (i32.and (i32.add (local.get $seen) (i32.const 15)) (i32.const -16)) (i32.const 2))))
    ;; scores of whole panels
    (local.set $at (local.get $scores))
    (loop $panel
      (local.set $a (v128.const i32x4 0 0 0 0))
      (local.set $b (v128.const i32x4 0 0 0 0))
      (local.set $c (v128.const i32x4 0 0 0 0))
      (local.set $d (v128.const i32x4 0 0 0 0))
      (local.set $row (local.get $query))
      (local.set $end (i32.add (local.get $query) (i32.shl (local.get $width) (i32.const 2))))
      (loop $next
        (local.set $one (v128.load32_splat (local.get $row)))
        (local.set $a (f32x4.add (local.get $a) (f32x4.mul (local.get $one) (v128.load (local.get $keys)))))
        (local.set $b (f32x4.add (local.get $b) (f32x4.mul (local.get $one) (v128.load offset=16 (local.get $keys)))))
        (local.set $c (f32x4.add (local.get $c) (f32x4.mul (local.get $one) (v128.load offset=32 (local.get $keys)))))
        (local.set $d (f32x4.add (local.get $d) (f32x4.mul (local.get $one) (v128.load offset=48 (local.get $keys)))))
        (local.set $keys (i32.add (local.get $keys) (i32.const 64)))
        (br_if $next (i32.lt_u (local.tee $row (i32.add (local.get $row) (i32.const 4))) (local.get $end))))
      (v128.store (local.get $at) (local.get $a))
      (v128.store offset=16 (local.get $at) (local.get $b))
      (v128.store offset=32 (local.get $at) (local.get $c))
      (v128.store offset=48 (local.get $at) (local.get $d))
      (br_if $panel (i32.lt_u (local.tee $at (i32.add (local.get $at) (i32.const 64))) (local.get $last))))
    ;; what is not seen yet has no share
    (local.set $at (i32.add (local.get $scores) (i32.shl (local.get $seen) (i32.const 2))))
    (block $done
      (loop $next
        (br_if $done (i32.ge_u (local.get $at) (local.get $last)))
        (f32.store (local.get $at) (f32.const -inf))
        (local.set $at (i32.add (local.get $at) (i32.const 4)))
        (br $next)))
    ;; softmax
    (local.set $most (v128.const f32x4 -inf -inf -inf -inf))
    (local.set $at (local.get $scores))
    (loop $next
      (local.set $most (f32x4.max (local.get $most) (v128.load (local.get $at))))
      (br_if $next (i32.lt_u (local.tee $at (i32.add (local.get $at) (i32.const 16))) (local.get $last))))
    (local.set $most (f32x4.splat (call $greatest (local.get $most))))
    (local.set $one (f32x4.splat (local.get $scale)))
    (local.set $a (v128.const i32x4 0 0 0 0))
    (local.set $b (v128.const i32x4 0 0 0 0))
    (local.set $c (v128.const i32x4 0 0 0 0))
    (local.set $d (v128.const i32x4 0 0 0 0))
    (local.set $at (local.get $scores))
    (loop $next
      (v128.store (local.get $at)
        (call $power_of_two (f32x4.mul (f32x4.sub (v128.load (local.get $at)) (local.get $most)) (local.get $one))))
      (v128.store offset=16 (local.get $at)
        (call $power_of_two (f32x4.mul (f32x4.sub (v128.load offset=16 (local.get $at)) (local.get $most)) (local.get $one))))
      (v128.store offset=32 (local.get $at)
        (call $power_of_two (f32x4.mul (f32x4.sub (v128.load offset=32 (local.get $at)) (local.get $most)) (local.get $one))))
      (v128.store offset=48 (local.get $at)
        (call $power_of_two (f32x4.mul (f32x4.sub (v128.load offset=48 (local.get $at)) (local.get $most)) (local.get $one))))
      (local.set $a (f32x4.add (local.get $a) (v128.load (local.get $at))))
      (local.set $b (f32x4.add (local.get $b) (v128.load offset=16 (local.get $at))))
      (local.set $c (f32x4.add (local.get $c) (v128.load offset=32 (local.get $at))))
      (local.set $d (f32x4.add (local.get $d) (v128.load offset=48 (local.get $at))))
      (br_if $next (i32.lt_u (local.tee $at (i32.add (local.get $at) (i32.const 64))) (local.get $last))))
    (local.set $one
      (f32x4.splat
        (f32.div (f32.const 1) (call $total (local.get $a) (local.get $b) (local.get $c) (local.get $d)))))
    (local.set $at (local.get $scores))
    (loop $next
      (v128.store (local.get $at) (f32x4.mul (v128.load (local.get $at)) (local.get $one)))
      (br_if $next (i32.lt_u (local.tee $at (i32.add (local.get $at) (i32.const 16))) (local.get $last))))
    ;; the mixture of values, 16 channels at a time
    (local.set $last (i32.add (local.get $scores) (i32.shl (local.get $seen) (i32.const 2))))
    (local.set $end (i32.add (local.get $out) (i32.shl (local.get $padded) (i32.const 2))))
    (loop $channels
      (local.set $a (v128.const i32x4 0 0 0 0))
      (local.set $b (v128.const i32x4 0 0 0 0))
      (local.set $c (v128.const i32x4 0 0 0 0))
      (local.set $d (v128.const i32x4 0 0 0 0))
      (local.set $at (local.get $scores))
      (local.set $value (local.get $values))
      (loop $next
        (local.set $one (v128.load32_splat (local.get $at)))
        (local.set $a (f32x4.add (local.get $a) (f32x4.mul (local.get $one) (v128.load (local.get $value)))))
        (local.set $b (f32x4.add (local.get $b) (f32x4.mul (local.get $one) (v128.load offset=16 (local.get $value)))))
        (local.set $c (f32x4.add (local.get $c) (f32x4.mul (local.get $one) (v128.load offset=32 (local.get $value)))))
        (local.set $d (f32x4.add (local.get $d) (f32x4.mul (local.get $one) (v128.load offset=48 (local.get $value)))))
        (local.set $value (i32.add (local.get $value) (i32.shl (local.get $padded) (i32.const 2))))
        (br_if $next (i32.lt_u (local.tee $at (i32.add (local.get $at) (i32.const 4))) (local.get $last))))
      (v128.store (local.get $out) (local.get $a))
      (v128.store offset=16 (local.get $out) (local.get $b))
      (v128.store offset=32 (local.get $out) (local.get $c))
      (v128.store offset=48 (local.get $out) (local.get $d))
      (local.set $values (i32.add (local.get $values) (i32.const 64)))
      (br_if $channels (i32.lt_u (local.tee $out (i32.add (local.get $out) (i32.const 64))) (local.get $end)))))

  ;; ── activations ──

  ;; SwiGLU: silu(gate) value.
  (func (export "silu") (param $gate i32) (param $value i32) (param $to i32) (param $count i32)
    (local $end i32) (local $x v128)
    (local.set $end (i32.add (local.get $to) (i32.shl (local.get $count) (i32.const 2))))
    (loop $next
      (local.set $x (v128.load (local.get $gate)))
      (v128.store (local.get $to)
        (f32x4.mul
          (f32x4.div
            (local.get $x)
            (f32x4.add
              (v128.const f32x4 1 1 1 1)
              (call $power_of_two
                (f32x4.mul
                  (f32x4.neg (local.get $x))
                  (v128.const f32x4 1.442695041 1.442695041 1.442695041 1.442695041)))))
          (v128.load (local.get $value))))
      (local.set $gate (i32.add (local.get $gate) (i32.const 16)))
      (local.set $value (i32.add (local.get $value) (i32.const 16)))
      (br_if $next (i32.lt_u (local.tee $to (i32.add (local.get $to) (i32.const 16))) (local.get $end)))))

  ;; The tanh form: x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3))).
  (func (export "gelu") (param $from i32) (param $to i32) (param $count i32)
    (local $end i32) (local $x v128)
    (local.set $end (i32.add (local.get $to) (i32.shl (local.get $count) (i32.const 2))))
    (loop $next
      (local.set $x (v128.load (local.get $from)))
      (v128.store (local.get $to)
        (f32x4.div
          (local.get $x)
          (f32x4.add
            (v128.const f32x4 1 1 1 1)
            (call $power_of_two
              (f32x4.mul
                (f32x4.mul
                  (v128.const f32x4 -1.5957691216 -1.5957691216 -1.5957691216 -1.5957691216)
                  (f32x4.add
                    (local.get $x)
                    (f32x4.mul
                      (f32x4.mul
                        (f32x4.mul (v128.const f32x4 0.044715 0.044715 0.044715 0.044715) (local.get $x))
                        (local.get $x))
                      (local.get $x))))
                (v128.const f32x4 1.442695041 1.442695041 1.442695041 1.442695041))))))
      (local.set $from (i32.add (local.get $from) (i32.const 16)))
      (br_if $next (i32.lt_u (local.tee $to (i32.add (local.get $to) (i32.const 16))) (local.get $end)))))
)
