"""Names of tensors as an attacker would write them: each would run `ATTACK` in a page that takes it for markup."""

from __future__ import annotations

ATTACK = "window.hit = (window.hit || 0) + 1"
HOSTILE = (
    f"layers.0.</script><script>{ATTACK}</script>.weight",
    f'layers.1."><img src=x onerror="{ATTACK}">.weight',
    f"layers.2.' onfocus='{ATTACK}' autofocus tabindex=0 x='.weight",
    "layers.3.<!--<script>{{ 7 * 7 }}{% raw %}.weight",
    "layers.4.\u202egnp.exe\u2066\u200b.weight",
    "layers.5.\x1b[31m\x07.weight",
    f"layers.6.javascript:{ATTACK}//&lt;b&gt;.weight",
    "layers.7.\u2028\u2029]]>*/</style>.weight",
)
