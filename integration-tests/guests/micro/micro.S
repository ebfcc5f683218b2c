# A whole guest in one sector: for tests that need many guests, or one in a fifth of a second.
#
# The firmware loads this sector from the guest's own disk. About once a second it adds one to a counter on that disk and
# says so on the serial port. It says, with BOOT different for each start of the machine (all numbers hexadecimal):
#
#   MICRO <counter> <boot>        it has started and read its counter from the disk
#   HB <counter> <boot>           one beat: the new counter is on the disk
#   SPLITBRAIN <found> <boot>     the counter on the disk is not what it wrote last: somebody else writes to this disk
#   DISKERROR                     a read or write failed; the beat did not count
#   POWEROFF                      the power button was pressed; it powers itself off
#
# The disk:  sector 1   the newest record: counter (4 bytes), boot (4 bytes)
#            16 + n     the record of each beat, n = counter modulo 1024
.code16
.globl start

.set COM1,     0x3f8
.set PM1_STS,  0x600          # ACPI: bit 8 is the power button; the addresses are QEMU's, on pc and on q35
.set PM1_EN,   0x602
.set PM1_CNT,  0x604
.set RING,     1023           # mask: how many beats are kept
.set TICKS,    18             # of the 18.2 Hz timer: 0.99 s

.set mine,     0x8000         # one sector: the record as this guest wrote it last
.set theirs,   0x8200         # one sector: the record as it is on the disk
.set packet,   0x8400         # what the firmware is told about a transfer

start:
        cli
        xor     %ax, %ax
        mov     %ax, %ds
        mov     %ax, %es
        mov     %ax, %ss
        mov     $start, %sp
        mov     %dl, drive

        # serial port: 115200 8N1, no interrupts
        mov     $COM1+3, %dx
        mov     $0x80, %al
        out     %al, %dx
        mov     $COM1, %dx
        mov     $1, %al
        out     %al, %dx
        inc     %dx
        dec     %ax
        out     %al, %dx
        mov     $COM1+3, %dx
        mov     $3, %al
        out     %al, %dx

        # the power button sets its status bit only while it is enabled
        mov     $PM1_EN, %dx
        mov     $0x0100, %ax
        out     %ax, %dx
        sti
        cld

1:      mov     $mine, %bx
        call    read
        jc      1b
        rdtsc
        mov     %eax, boot
        mov     $hello, %si
        mov     mine, %eax
        call    line
        jmp     write

beat:
        mov     $theirs, %bx
        call    read
        jc      failed
        mov     theirs, %eax
        cmp     mine, %eax
        jne     stranger
        mov     theirs+4, %edx
        cmp     mine+4, %edx
        je      write
stranger:
        mov     $split, %si
        call    line
write:
        incl    mine
        mov     boot, %eax
        mov     %eax, mine+4
        mov     $1, %ecx
        call    store
        jc      failed
        mov     mine, %ecx
        and     $RING, %ecx
        add     $16, %ecx
        call    store
        jc      failed
        mov     $alive, %si
        mov     mine, %eax
        call    line
wait:
        mov     $TICKS, %cx
2:      mov     $PM1_STS, %dx
        in      %dx, %ax
        test    $0x01, %ah
        jnz     off
        hlt
        loop    2b
        jmp     beat
failed:
        mov     $error, %si
        call    puts
        jmp     wait
off:
        mov     $bye, %si
        call    puts
        mov     $PM1_CNT, %dx
        mov     $0x2000, %ax            # sleep enable, type 0: soft off
        out     %ax, %dx
3:      cli
        hlt
        jmp     3b

# One sector by the firmware. read: sector 1 to BX. store: `mine` to sector ECX. Carry: it failed.
read:
        mov     $1, %ecx
        mov     $0x42, %ah
        jmp     transfer
store:
        mov     $mine, %bx
        mov     $0x43, %ah
transfer:
        movl    $0x00010010, packet     # 16 bytes long, one sector
        movzwl  %bx, %ebx
        mov     %ebx, packet+4          # segment 0
        mov     %ecx, packet+8
        movl    $0, packet+12
        mov     $packet, %si
        mov     drive, %dl
        xor     %al, %al
        int     $0x13
        ret

# SI, then EAX and the boot in hexadecimal, then the end of the line.
line:
        push    %eax
        call    puts
        pop     %eax
        call    hex
        mov     $' ', %al
        call    putc
        mov     boot, %eax
        call    hex
        mov     $newline, %si
puts:
        lodsb
        test    %al, %al
        jz      9f
        call    putc
        jmp     puts
hex:
        mov     $8, %cx
4:      rol     $4, %eax
        push    %ax
        and     $15, %al
        cmp     $10, %al                # 0..9 or a..f without a table
        sbb     $0x69, %al
        das
        or      $0x20, %al
        call    putc
        pop     %ax
        loop    4b
9:      ret
putc:
        push    %ax
        mov     $COM1+5, %dx
5:      in      %dx, %al
        test    $0x20, %al
        jz      5b
        pop     %ax
        mov     $COM1, %dx
        out     %al, %dx
        ret

hello:  .asciz "MICRO "
alive:  .asciz "HB "
split:  .asciz "SPLITBRAIN "
error:  .asciz "DISKERROR\r\n"
bye:    .asciz "POWEROFF\r\n"
newline: .asciz "\r\n"
drive:  .byte 0
boot:   .long 0
        .org 510
        .word 0xaa55
