/* Starts a freestanding program on a bare PC with AVX-512: the BIOS loads the first 512 bytes,
 * these load the rest of the disk, enter 64-bit mode and enable the vector registers.
 * CHUNKS: the size of the program in units of 64 sectors.
 */
    .set LOAD, 0x10000          /* where the program is linked to run */
    .set TABLES, 0x1000         /* three page tables */
    .set STACK, 0x800000

    .code16
    .globl _start
_start:
    ljmp $0, $1f
1:  xor %ax, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov $0x7c00, %sp
    cld
    inb $0x92, %al              /* address line 20 */
    or $2, %al
    outb %al, $0x92

    mov $CHUNKS, %cx
2:  push %cx
    mov $packet, %si
    mov $0x42, %ah              /* extended read of the drive in dl */
    int $0x13
    jc stop
    addw $0x800, packet_segment
    addl $64, packet_sector
    pop %cx
    loop 2b

    mov $TABLES, %edi           /* the first GiB maps to itself, in pages of 2 MiB */
    mov %edi, %cr3
    xor %eax, %eax
    mov $3 * 1024, %ecx
    rep stosl
    movl $TABLES + 0x1003, TABLES
    movl $TABLES + 0x2003, TABLES + 0x1000
    mov $TABLES + 0x2000, %edi
    mov $0x83, %eax
3:  mov %eax, (%edi)
    add $8, %edi
    add $0x200000, %eax
    cmp $0x40000083, %eax
    jne 3b

    cli
    mov $0x40620, %eax          /* cr4: PAE, OSFXSR, OSXMMEXCPT, OSXSAVE */
    mov %eax, %cr4
    mov $0xc0000080, %ecx       /* EFER.LME */
    rdmsr
    or $0x100, %eax
    wrmsr
    mov $0x80000003, %eax       /* cr0: PG, MP, PE */
    mov %eax, %cr0
    lgdt gdt_pointer
    ljmp $8, $4f
stop:
    hlt
    jmp stop

    .code64
4:  xor %eax, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $STACK, %rsp
    xor %ecx, %ecx              /* xcr0: x87, SSE, AVX, mask and both ZMM states */
    xor %edx, %edx
    mov $0xe7, %eax
    xsetbv
    mov $LOAD, %eax
    call *%rax

    .balign 8
gdt:
    .quad 0, 0x00209a0000000000 /* 64-bit code */
gdt_pointer:
    .word 15
    .long gdt
packet:
    .byte 16, 0
    .word 64
    .word 0
packet_segment:
    .word LOAD / 16
packet_sector:
    .long 1, 0

    .org 510
    .word 0xaa55
